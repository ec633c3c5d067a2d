"""Renders tables and examples of docstrings in the API reference."""

import re

import griffe

RULE = re.compile(r"^ *={3,}(?: +={3,})+ *$")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod):(?=`)")


class DocstringSections(griffe.Extension):
    """Rewrites docstrings to the syntax of griffe and Markdown."""

    def on_object(self, *, obj, **kwargs):
        """Renames sections of examples, removes roles, and converts tables to Markdown."""
        if obj.docstring is not None:
            text = ROLE.sub("", EXAMPLE.sub("Examples:", obj.docstring.value))
            obj.docstring.value = with_markdown_tables(text)


def with_markdown_tables(text):
    """Converts reStructuredText tables, each enclosed by three rules of `=`, to Markdown.

    A row without a first cell continues the previous one.
    """
    lines = text.splitlines()
    rules = [index for index, line in enumerate(lines) if RULE.match(line)]
    for top, middle, bottom in reversed(list(zip(*[iter(rules)] * 3, strict=True))):
        spans = [match.span() for match in re.finditer("=+", lines[top])]
        starts = [start for start, _ in spans]
        ends = [*starts[1:], None]

        def cells(line, starts=starts, ends=ends):
            pairs = zip(starts, ends, strict=True)
            return [line[start:end].strip() for start, end in pairs]

        rows = []
        for line in lines[middle + 1 : bottom]:
            found = cells(line)
            # A first cell that ends in a comma continues in the next line.
            if rows and (not found[0] or rows[-1][0].endswith(",")):
                rows[-1] = [
                    f"{old} {new}".strip() for old, new in zip(rows[-1], found, strict=True)
                ]
            else:
                rows.append(found)
        table = [cells(lines[top + 1]), ["---"] * len(starts), *rows]
        lines[top : bottom + 1] = ["", *(f"| {' | '.join(row)} |" for row in table), ""]
    return "\n".join(lines)
