"""Brand folders: what is read, and that mistakes are told with the file they are in."""

from pathlib import Path

import pytest

from pipeline.documents.brand import Brand, BrandError, load_brand

EXAMPLE = Path(__file__).parents[2] / "deploy" / "branding"


def test_the_example_is_a_brand() -> None:
    brand = load_brand(EXAMPLE)
    assert (brand.primary, brand.accent, brand.paper) == ("#12324a", "#1f8a70", "a4")
    assert brand.logo is not None and brand.logo[0] == "image/svg+xml" and b"<svg" in brand.logo[1]


def test_without_a_folder_it_is_tally_s_own() -> None:
    assert load_brand(None, "nordwind") == Brand()


def test_a_legal_entity_may_have_its_own(tmp_path: Path) -> None:
    (tmp_path / "brand.yaml").write_text("paper: us-letter\n")
    (tmp_path / "nordwind").mkdir()
    (tmp_path / "nordwind" / "brand.yaml").write_text('accent: "#00ff00"\n')
    assert load_brand(tmp_path, "nordwind").accent == "#00ff00"
    assert load_brand(tmp_path, "other").paper == "us-letter"
    assert load_brand(tmp_path, "../nordwind").paper == "us-letter"  # an id is no way out of the folder


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("accent: blue", "brand.yaml: accent: String should match"),
        ("colour: '#000000'", "brand.yaml: colour: Extra inputs"),
        ("logo: logo.gif", "logo: expected a file ending in .*got logo.gif"),
        ("logo: gone.svg", "cannot read gone.svg: No such file"),
        ("words: {en: {invoce: Bill}}", "words.en: no such words: invoce"),
        ("words: {nl: {invoice: Factuur}}", "words.nl: a new language needs every word, missing: account,"),
        ("a: [", "expected YAML"),
        ("- a list", "brand.yaml: Input should be"),
    ],
)
def test_mistakes(tmp_path: Path, written: str, problem: str) -> None:
    (tmp_path / "brand.yaml").write_text(written)
    with pytest.raises(BrandError, match=problem):
        load_brand(tmp_path)


def test_a_folder_without_a_brand(tmp_path: Path) -> None:
    with pytest.raises(BrandError, match=r"expected a brand\.yaml, found none"):
        load_brand(tmp_path)
