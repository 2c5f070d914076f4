"""Documents as PDF/A-3: laid out by typst, accessible (PDF/UA), the same bytes for the same document and brand.

The e-invoice is embedded as ``factur-x.xml``, and the metadata says so as Factur-X wants it (its specification,
section 6): typst writes the rest of PDF/A, and cannot be told of another schema's metadata, so that is added to the
finished file as an incremental update.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, time
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import typst

from pipeline.documents.brand import Brand
from pipeline.documents.language import Language, language
from pipeline.documents.model import Document, Line
from pipeline.documents.page import page

_TEMPLATE = Path(__file__).parent / "template"
#: Required name and relationship of the embedded e-invoice (Factur-X 1.0, 6.2).
XML_NAME = "factur-x.xml"
_ATTACH = f"""
#pdf.attach("{XML_NAME}", read("{XML_NAME}", encoding: none), relationship: "alternative", mime-type: "text/xml",
  description: "Factur-X, EN 16931")
"""


class RenderError(ValueError):
    """A document that cannot be laid out: what typst says of it, and what to do; the letters that no font has."""

    def __init__(self, message: str, missing: str = "") -> None:
        super().__init__(message)
        self.missing = missing


class Renderer:
    """Makes PDFs in one brand's look. Loading fonts takes most of the first one's time: keep it for many documents."""

    def __init__(self, brand: Brand) -> None:
        self.brand = brand
        self._template = brand.template or (_TEMPLATE / "document.typ").read_text(encoding="utf-8")
        self._languages: dict[str, Language] = {}
        self._compiler = typst.Compiler(
            font_paths=[str(_TEMPLATE / "fonts"), *map(str, brand.font_folders)], ignore_system_fonts=True
        )

    def pdf(self, document: Document, e_invoice: bytes | None = None) -> bytes:
        """The document as PDF, with its e-invoice inside where one is given. Its date is that of issue.

        Letters that no font has are printed as U+FFFD in what events brought (references, dimensions): no event stops
        an invoice. In all other texts they are an error, since a name is not to be guessed.

        Raises RenderError where the template needs what is not there, or a name letters that no font has.
        """
        try:
            made = self._lay_out(document, e_invoice)
        except RenderError as error:
            readable = _without(document, error.missing)
            if readable == document:
                raise
            made = self._lay_out(readable, e_invoice)
        return made if e_invoice is None else _with_factur_x_metadata(made)

    def _lay_out(self, document: Document, e_invoice: bytes | None) -> bytes:
        logo = self._logo(document)
        data = page(document, self.brand, self._language(document.language), logo[0] if logo else None)
        template = self._template
        sources: dict[str, bytes] = {"data.json": json.dumps(data, ensure_ascii=False).encode()}
        if logo is not None:
            sources[logo[0]] = logo[1]
        if e_invoice is not None:
            sources[XML_NAME] = e_invoice
            template += _ATTACH
        return self._compile({"main": template.encode(), **sources}, document)

    def _language(self, tag: str) -> Language:
        if tag not in self._languages:
            self._languages[tag] = language(tag, self.brand.words)
        return self._languages[tag]

    def _logo(self, document: Document) -> tuple[str, bytes] | None:
        """The brand's logo, else the one its legal entity applied: a file for the template.

        typst takes files from memory as text alone, so what is no SVG comes as the JSON list of its bytes.
        """
        media_type, content = self.brand.logo or document.logo or ("", b"")
        if not content:
            return None
        return ("logo.svg", content) if media_type == "image/svg+xml" else ("logo.json", _list_of(content))

    def _compile(self, sources: dict[str, bytes], document: Document) -> bytes:
        day = document.issue_date or document.tax_date
        # Also the time of the file: nothing in it tells when it was made, so that it can be made again.
        at = int(datetime.combine(day, time(), UTC).timestamp())
        try:
            made = self._compiler.compile(
                input=cast(Any, sources),  # its stub leaves out what its documentation allows: files by name
                pdf_standards=["a-3a", "ua-1"],  # with its structure, in Unicode; made to be read aloud
                timestamp=at,
            )
        except RuntimeError as error:  # its own is one; another where a file from memory is no text
            raise _explained(document, error) from error
        assert isinstance(made, bytes), "typst gives one PDF for one input"
        return made


@lru_cache(maxsize=8)
def _list_of(content: bytes) -> bytes:
    return json.dumps([*content]).encode()


_NO_LETTER = re.compile(r'the text `"(.+?)"` could not be displayed')
_ESCAPED = re.compile(r"\\u\{([0-9a-f]+)\}")


def _explained(document: Document, error: RuntimeError) -> RenderError:
    name = document.number or f"draft {document.id}"
    # Every one of typst's complaints stands in its diagnostic, in its message the first alone.
    texts = dict.fromkeys(_NO_LETTER.findall(getattr(error, "diagnostic", "")))
    missing = "".join(_ESCAPED.sub(lambda code: chr(int(code[1], 16)), text) for text in texts)
    if missing:
        return RenderError(
            f"{name}: no font has the letters {missing!r}: put one that has them into fonts/ of the brand's folder",
            missing,
        )
    return RenderError(f"{name}: {error}")


def _without(document: Document, letters: str) -> Document:
    """The document with a mark in place of these letters in what events brought."""
    marked = str.maketrans(dict.fromkeys(letters, "\N{REPLACEMENT CHARACTER}"))
    return replace(document, lines=tuple(_marked(line, marked) for line in document.lines))


def _marked(line: Line, letters: Mapping[int, str]) -> Line:
    usage = line.usage and replace(
        line.usage,
        references=tuple(
            replace(one, values=tuple(value.translate(letters) for value in one.values))
            for one in line.usage.references
        ),
    )
    return replace(line, usage=usage, cell=tuple((name, value.translate(letters)) for name, value in line.cell))


#: Properties of the embedded e-invoice, and the declaration of their schema that PDF/A wants (ISO 19005-3, 6.6.2.3).
_PROPERTIES = (
    ("DocumentFileName", XML_NAME, "The name of the embedded XML document"),
    ("DocumentType", "INVOICE", "The type of the document, in capital letters"),
    ("Version", "1.0", "The version of the standard of the embedded XML document"),
    ("ConformanceLevel", "EN 16931", "The profile of the embedded XML document"),
)
_FACTUR_X = "urn:factur-x:pdfa:CrossIndustryDocument:invoice:1p0#"


def _schema() -> str:
    properties = "".join(
        f'<rdf:li rdf:parseType="Resource"><pdfaProperty:name>{name}</pdfaProperty:name>'
        f"<pdfaProperty:valueType>Text</pdfaProperty:valueType><pdfaProperty:category>external</pdfaProperty:category>"
        f"<pdfaProperty:description>{text}</pdfaProperty:description></rdf:li>"
        for name, _, text in _PROPERTIES
    )
    return (
        '<rdf:li rdf:parseType="Resource"><pdfaSchema:schema>Factur-X PDFA Extension Schema</pdfaSchema:schema>'
        f"<pdfaSchema:namespaceURI>{_FACTUR_X}</pdfaSchema:namespaceURI><pdfaSchema:prefix>fx</pdfaSchema:prefix>"
        f"<pdfaSchema:property><rdf:Seq>{properties}</rdf:Seq></pdfaSchema:property></rdf:li>"
    )


_METADATA = re.compile(
    rb"\n(\d+) 0 obj\n<</Length \d+/Type/Metadata/Subtype/XML>>\nstream\n(.*?)\nendstream", re.DOTALL
)
_TRAILER = re.compile(rb"trailer\n<<(.*)>>\nstartxref\n(\d+)\n%%EOF\s*$", re.DOTALL)


def _with_factur_x_metadata(made: bytes) -> bytes:
    """The file with an update behind it that replaces its metadata by the same and Factur-X's.

    Written out here, in the form that typst wrote the file (ISO 32000-1, 7.5.6): the libraries that could do it put
    today's date into the file, or write a cross-reference stream behind a table.
    """
    metadata, trailer = _METADATA.search(made), _TRAILER.search(made)
    assert metadata and trailer, "typst writes metadata plainly, as PDF/A wants, and a cross-reference table"
    said = "".join(f"<fx:{name}>{value}</fx:{name}>" for name, value, _ in _PROPERTIES)
    text = metadata[2].decode()
    for place, more in (
        ("</rdf:Bag></pdfaExtension:schemas>", _schema()),
        ("</rdf:RDF>", f'<rdf:Description rdf:about="" xmlns:fx="{_FACTUR_X}">{said}</rdf:Description>'),
    ):
        before, found, after = text.partition(place)
        assert found, f"typst's metadata has {place}"
        text = f"{before}{more}{place}{after}"
    xmp = text.encode()
    number, start = int(metadata[1]), len(made) + 1
    replaced = b"%d 0 obj\n<</Length %d/Type/Metadata/Subtype/XML>>\nstream\n%b\nendstream\nendobj\n" % (
        number,
        len(xmp),
        xmp,
    )
    table = b"xref\n0 1\n0000000000 65535 f\r\n%d 1\n%010d 00000 n\r\n" % (number, start)
    end = b"trailer\n<<%b/Prev %d>>\nstartxref\n%d\n%%%%EOF\n" % (trailer[1], int(trailer[2]), start + len(replaced))
    return b"%b\n%b%b%b" % (made, replaced, table, end)
