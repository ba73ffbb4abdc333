"""Prints the contents of this image as a CycloneDX document: every Python distribution and every Debian package.

The Dockerfile runs it with the image's own Python. It uses only the standard library.
"""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path


def licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """Return the licence as declared: the expression, else the classifiers, else the first line of the free text."""
    classifiers = [
        value.rpartition(" :: ")[2] for value in metadata.get_all("Classifier", []) if value.startswith("License")
    ]
    text = (metadata.get("License") or "unknown").strip().splitlines()
    return metadata.get("License-Expression") or ", ".join(classifiers) or (text[0] if text else "unknown")


def affero(distribution: importlib.metadata.Distribution) -> int:
    """Count the modules whose header names the AGPL, whatever licence the package as a whole declares."""
    heads = [Path(distribution.locate_file(file)) for file in distribution.files or () if file.suffix == ".py"]
    return sum(b"Affero" in path.open("rb").read(2000) for path in heads if path.is_file())


def python_packages() -> list[dict[str, object]]:
    found = {}
    for distribution in importlib.metadata.distributions():
        metadata, version = distribution.metadata, distribution.version
        name = metadata["Name"]
        licences = [licence(metadata)]
        marked = affero(distribution)
        if marked:
            licences.append(f"AGPL-3.0 in the heads of {marked} files")
        found[name.lower()] = {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower()}@{version}",
            "licenses": [{"license": {"name": text}} for text in licences],
        }
    return [found[name] for name in sorted(found)]


def debian_packages() -> list[dict[str, object]]:
    form = "${Package}\t${Version}\t${Architecture}\n"
    listing = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    rows = [line.split("\t") for line in listing.splitlines()]
    return [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:deb/debian/{name}@{version}?arch={arch}"}
        for name, version, arch in rows
    ]


document = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.5",
    "version": 1,
    "components": python_packages() + debian_packages(),
}
json.dump(document, sys.stdout, indent=1)
