"""What the site holds beside docs/: README as its first page, the notebook, and the files of the repository that pages link to.

It also turns formulas into MathML, and names of the API that stand as code into links to the reference.
"""

import base64
import json
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/quickstart.ipynb": "quickstart.md",
}
SOURCES = {site: repository for repository, site in PAGES.items()}
SHOWN = {".py": "python", ".cff": "yaml"}  # as a page with highlighted code, not as a download
CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)|(?P<before>\]\(|src=\")(?!https?:|#)(?P<link>[^)#\s\"]+)", re.M | re.S
)


def place(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"repository/{path}" + (".md" if Path(path).suffix in SHOWN else ""))


def target(site: str, link: str) -> str:
    """The file of the repository that the page ``site`` means by ``link``."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(SOURCES.get(site, f"docs/{site}")), link))


def on_config(config: MkDocsConfig) -> None:
    """A page that mkdocs.yml does not name comes last in "Evidence": a new page is never lost."""
    evidence = next(section["Evidence"] for section in config.nav if "Evidence" in section)
    evidence += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in str(config.nav)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, site in PAGES.items():
        text = (ROOT / path).read_text()
        if path.endswith(".ipynb"):
            text, pictures = notebook(text)
            for name, picture in pictures.items():
                files.append(File.generated(config, name, content=picture))
        files.append(File.generated(config, site, content=text))
    for page in files.documentation_pages():
        for path in {target(page.src_uri, m["link"]) for m in CODE_OR_LINK.finditer(page.content_string) if m["link"]}:
            site, language = place(path), SHOWN.get(Path(path).suffix)
            if files.get_file_from_path(site) or not (ROOT / path).is_file():
                continue  # a link to nothing is mkdocs' error
            if language:
                content = f"# {path}\n\n````{language}\n{(ROOT / path).read_text()}````\n"
                files.append(File.generated(config, site, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
            else:
                files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


def notebook(text: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, with what its cells gave, and its pictures by their names."""
    parts, pictures = [], {}
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"quickstart-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![what the cell above draws]({name})")
            elif printed := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{''.join(printed).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    site = page.file.src_uri
    if site.startswith("repository/"):
        return markdown
    if site == "index.md":
        page.meta["hide"] = ["navigation"]  # it would hold one entry
        markdown = re.sub(r"^!\[.*\]\(https://img\.shields\.io/.*\)\n", "", markdown, flags=re.M)  # the site asks nobody else

    def moved(match: re.Match[str]) -> str:
        if match["code"] or match["link"].startswith("quickstart-"):
            return match[0]
        return match["before"] + posixpath.relpath(place(target(site, match["link"])), posixpath.dirname(site) or ".")

    return CODE_OR_LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    html = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, html, flags=re.S)
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M)
    reference = posixpath.relpath("api.html", posixpath.dirname(page.url) or ".")

    def linked(match: re.Match[str]) -> str:
        written = match["name"]
        meant = [name for name in names if written and name.endswith(f".{written}")]
        if written and "." not in written:  # `masks` or `call` alone may be an argument
            meant = [name for name in meant if not written.islower() or ("_" in written and ".reference." not in name)]
        return f'<a href="{reference}#{meant[0]}">{match[0]}</a>' if len(meant) == 1 else match[0]

    skipped = r"<a\b.*?</a>|<h\d\b.*?</h\d>|<pre\b.*?</pre>|<div class=\"language.*?</pre>"
    return re.sub(rf"{skipped}|<code>(?:maskd_triton\.)?(?P<name>[\w.]+)</code>", linked, html, flags=re.S)


def formula(match: re.Match[str]) -> str:
    """TeX as MathML, which browsers draw without a script."""
    import html

    if match[1] == "span":
        return convert(html.unescape(match[2]))
    return f'<div class="formula">{convert(html.unescape(match[2]), display="block")}</div>'
