"""The job spec: its schema, the rules between fields, and how it is loaded."""
