"""`python -m job`: the container's entry point. Signals are heard before anything heavy is imported."""

from job.cli import main

if __name__ == "__main__":
    main()
