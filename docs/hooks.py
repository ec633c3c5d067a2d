"""Adds files from outside docs/ to the site, so that links work in the site and in a checkout.

Pages link to files by their path in the repository. Of files outside docs/, Markdown files in the
navigation become pages, images are copied, and all others become pages under `source/` with their
text, or with the list of a folder.
"""

import os
import posixpath
import re
import subprocess
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site, by name in it, that lie outside docs/.
OUTSIDE_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
IMAGES = (".svg", ".png")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".cpp": "cpp", ".h": "cpp"}
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)#\s]+)((?:#[^)]*)?\))")


def on_files(files, config):
    """Adds the pages outside of docs/, and all files that pages link to."""
    for name in OUTSIDE_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    pages = [place_of(file.src_uri) for file in files.documentation_pages()]
    waiting = sorted({path for page in pages for path in _linked(page)})
    seen = set()
    while waiting:
        path = waiting.pop()
        name = _name_in_site(path)
        if path in seen or path.startswith("docs/") or path in OUTSIDE_PAGES:
            continue
        seen.add(path)
        if path.endswith(IMAGES):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
        else:
            text = _shown_folder(path) if (ROOT / path).is_dir() else _shown_file(path)
            files.append(File.generated(config, name, content=text))
        if (ROOT / path).is_dir():
            waiting += _files_of(path)
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites links to the names of files in the site."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    folder = posixpath.dirname(place_of(page.file.src_uri))
    here = posixpath.dirname(page.file.src_uri)

    def pointed(match):
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if not (ROOT / path).exists():
            return match[0]
        return match[1] + posixpath.relpath(_name_in_site(path), here or ".") + match[3]

    return LINK.sub(pointed, markdown)


def place_of(name):
    """Path in the repository of a page of the site."""
    return name if name in OUTSIDE_PAGES else f"docs/{name}"


def _linked(page):
    """Files and folders of the repository that a page links to, by their paths."""
    folder = posixpath.dirname(page)
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = [posixpath.normpath(posixpath.join(folder, m[2])) for m in LINK.finditer(text)]
    return [path for path in paths if (ROOT / path).exists()]


def _name_in_site(path):
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    return path if path in OUTSIDE_PAGES or path.endswith(IMAGES) else f"source/{path}.md"


def _files_of(folder):
    """Files below a folder: those tracked by git, or all files without git."""
    listed = subprocess.run(
        ["git", "ls-files", "--", folder], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    found = listed or [
        os.path.relpath(path, ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    return sorted(path for path in found if not path.endswith((".safetensors", ".pyc")))


def _shown_folder(folder):
    lines = [f"# {folder}", ""]
    for path in _files_of(folder):
        name = posixpath.relpath(_name_in_site(path), f"source/{posixpath.dirname(folder)}")
        lines.append(f"- [{path}]({name})")
    return "\n".join(lines)


def _shown_file(path):
    language = LANGUAGES.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"# {path}\n\n````{language}\n{text}\n````\n"
