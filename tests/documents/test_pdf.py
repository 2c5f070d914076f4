"""PDFs as a reader and a program see them: text, pages, the e-invoice inside; and the same bytes every time."""

import base64
import io
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pypdfium2
import pytest
from lxml import etree
from pypdf import PdfReader

from pipeline.documents.brand import Brand
from pipeline.documents.einvoice import cii_xml
from pipeline.documents.model import Document
from pipeline.documents.pdf import XML_NAME, Renderer, RenderError
from pipeline.documents.render import Maker
from tests.documents import samples

BRANDING = Path(__file__).parents[2] / "deploy" / "branding"
FACTUR_X = "{urn:factur-x:pdfa:CrossIndustryDocument:invoice:1p0#}"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(Brand())


def pages(made: bytes) -> list[str]:
    with pypdfium2.PdfDocument(made) as opened:
        return [" ".join(page.get_textpage().get_text_range().split()) for page in opened]


def test_the_page_says_what_the_document_says(renderer: Renderer) -> None:
    [first, annex] = pages(renderer.pdf(samples.domestic()))
    for text in ("Rechnung", "2026-000017", "Muster Maschinenbau GmbH & Co. KG", "fällig am 2. Dezember 2026",
                 "DE89 3704 0044 0532 0130 00", "Zahlbar ohne Abzug", "Seite 1 von 2"):  # fmt: skip
        assert text in first
    assert "Verbrauch zu dieser Rechnung" in annex and "48.213" in annex


def test_long_documents_repeat_their_heads_and_number_their_pages(renderer: Renderer) -> None:
    made = pages(renderer.pdf(samples.long()))
    lines = [page for page in made if "node pool" in page and "Unit price" in page]
    assert len(lines) >= 3
    for number, page in enumerate(made, 1):
        assert f"Page {number} of {len(made)}" in page
    for page in lines[1:]:
        assert "Nordwind Cloud GmbH Invoice 2026-000017" in page
        assert "Acme Robotics Europe" in page or "Acme Robotics USA" in page  # whose lines these are
    assert sum("Amount due" in page for page in made) == 1


def test_a_line_stays_on_one_page_with_its_tiers(renderer: Renderer) -> None:
    fee, _, tiered, *_ = samples.lines()
    for before in range(6):  # so that the pages end at other places
        for page in pages(renderer.pdf(samples.document([*[fee] * before, *[tiered] * 16]))):
            if "Unit price" in page:
                assert page.count("large · eu") == page.count("Included") == page.count("Flat fee €2.50")


def test_a_line_with_more_parts_than_a_page_holds_goes_on_over_pages(renderer: Renderer) -> None:
    parts = [samples.part("usage", str(at), str(at + 1), "0.5") for at in range(150)]
    made = pages(renderer.pdf(samples.document([samples.usage_line("Ladder", "150", "unit", parts)])))
    assert sum(page.count("0.50") for page in made) >= 150
    assert any("149 to 150" in page for page in made)


def test_the_same_document_gives_the_same_bytes_in_every_process() -> None:
    program = "from tests.documents.test_pdf import digests; print(*digests())"
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=BRANDING.parents[1],
        env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LANG": "fr_FR.UTF-8"},
    )  # fmt: skip
    assert other.stdout.split() == digests()


def digests() -> list[str]:
    maker = Maker(BRANDING)
    all_of_them = samples.cross_border(), samples.french_credit_note(), samples.yen(), samples.long()
    return [sha256(maker.pdf(of)[0]).hexdigest() for of in all_of_them]


def test_the_e_invoice_is_inside_and_the_metadata_say_so(renderer: Renderer) -> None:
    of = samples.cross_border()
    xml = cii_xml(of)
    reader = PdfReader(io.BytesIO(renderer.pdf(of, xml)), strict=True)
    assert reader.attachments == {XML_NAME: [xml]}
    catalog = reader.root_object
    [associated] = catalog["/AF"]
    assert associated.get_object()["/AFRelationship"] == "/Alternative"
    xmp = etree.fromstring(catalog["/Metadata"].get_data())
    said = {name: xmp.findtext(f".//{FACTUR_X}{name}") for name in ("DocumentFileName", "DocumentType", "Version")}
    assert said == {"DocumentFileName": XML_NAME, "DocumentType": "INVOICE", "Version": "1.0"}
    assert xmp.findtext(f".//{FACTUR_X}ConformanceLevel") == "EN 16931"
    pdfa = "{http://www.aiim.org/pdfa/ns/id/}"
    assert (xmp.findtext(f".//{pdfa}part"), xmp.findtext(f".//{pdfa}conformance")) == ("3", "A")
    assert reader.metadata is not None and reader.metadata.title == "Invoice 2026-000017"


def test_every_font_is_in_the_file(renderer: Renderer) -> None:
    fonts = {
        font["/FontDescriptor"]["/FontName"]: {"/FontFile2", "/FontFile3"} & set(font["/FontDescriptor"])
        for page in PdfReader(io.BytesIO(renderer.pdf(samples.long()))).pages
        for named in page["/Resources"]["/Font"].values()
        for font in named["/DescendantFonts"]
    }
    assert fonts and all(fonts.values())
    assert all("Inter" in name for name in fonts)


def test_letters_that_no_font_has_are_named_not_left_out(renderer: Renderer) -> None:
    of = replace(samples.domestic(), buyer=replace(samples.BUYER, name="株式会社ホシ"))
    with pytest.raises(RenderError, match=r"2026-000017: no font has the letters '株.*シ': put one .* into fonts/"):
        renderer.pdf(of)


def test_what_events_brought_never_stops_an_invoice(renderer: Renderer) -> None:
    line = samples.usage_line(
        "Calls", "1", "call", [samples.part("usage", "0", "1", "1")], cell=(("team", "\x01雪"),),
        references=(samples.Reference("order", ("A-1 \N{GRINNING FACE}", "é")),),
    )  # fmt: skip
    of = samples.document([line])
    made = renderer.pdf(of, cii_xml(of))
    assert (
        "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} order: A-1 \N{REPLACEMENT CHARACTER}, é" in pages(made)[0]
    )
    assert "\N{REPLACEMENT CHARACTER}雪".encode() in cii_xml(of)  # XML lacks the one, a font both
    with pytest.raises(RenderError, match="'雪'"):
        renderer.pdf(replace(of, buyer=replace(samples.BUYER, name="雪")))


@pytest.mark.parametrize("media_type", ["image/svg+xml", "image/png"])
def test_a_logo_that_was_applied_takes_the_name_s_place(renderer: Renderer, media_type: str) -> None:
    content = {
        "image/svg+xml": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="3"><path d="M0 0h9v3z"/></svg>',
        "image/png": base64.b64decode(
            "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
        ),
    }
    of = samples.domestic()
    plain, with_logo = (renderer.pdf(one) for one in (of, replace(of, logo=(media_type, content[media_type]))))
    assert [pages(one)[0].count("Nordwind Cloud GmbH") for one in (plain, with_logo)] == [4, 3]


def test_a_logo_that_is_none_is_told(renderer: Renderer) -> None:
    with pytest.raises(RenderError, match="2026-000017: failed to parse SVG"):
        renderer.pdf(replace(samples.domestic(), logo=("image/svg+xml", b"<svg")))


def test_a_brand_may_bring_its_template() -> None:
    template = '#set document(title: "x", date: datetime(year: 2026, month: 1, day: 1))\n#set text(lang: "en")\n'
    brand = Brand(
        template=template + '#let d = json("data.json")\nOURS #d.number #d.headline.amount #datetime.today().display()'
    )
    of = samples.domestic()
    made = Renderer(brand).pdf(of, cii_xml(of))
    # Its today is the day of issue, or it would be other bytes tomorrow.
    assert pages(made)[0] == "OURS 2026-000017 2.826,03 € 2026-11-02"
    assert XML_NAME in PdfReader(io.BytesIO(made)).attachments
    with pytest.raises(RenderError, match="2026-000017: unknown variable: nonsense"):
        Renderer(Brand(template="#nonsense")).pdf(of)


@pytest.mark.parametrize(("state", "stamp"), [("draft", "DRAFT"), ("void", "VOID")])
def test_what_is_no_invoice_says_so_across_the_page(renderer: Renderer, state: str, stamp: str) -> None:
    of: Document = replace(samples.cross_border(), state=state)  # type: ignore[arg-type]
    text = pages(renderer.pdf(of))
    assert all(stamp in page for page in text)
    assert "IBAN" not in text[0]
