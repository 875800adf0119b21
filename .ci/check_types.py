"""pyright flags every line of tests/typing/wrong_uses.py that ends in `# wrong`, and no other."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "typing" / "wrong_uses.py"


def main() -> None:
    lines = FILE.read_text().splitlines()
    wanted = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    pyright = pathlib.Path(sys.executable).with_name("pyright")
    command = [pyright, "--outputjson", "--pythonpath", sys.executable, FILE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {entry["range"]["start"]["line"] + 1 for entry in json.loads(done.stdout)["generalDiagnostics"]}
    for numbers, what in ((wanted - found, "not flagged"), (found - wanted, "flagged, but not marked")):
        for number in sorted(numbers):
            print(f"{FILE.relative_to(ROOT)}:{number}: {what}: {lines[number - 1]}")
    if found != wanted:
        sys.exit(1)
    print(f"{len(wanted)} wrong uses, all flagged")


if __name__ == "__main__":
    main()
