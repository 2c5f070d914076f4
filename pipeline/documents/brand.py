"""How a company's documents look: a folder with a ``brand.yaml``, a logo, fonts and, if it must be, a template.

A folder may hold one brand, or one per legal entity in folders named by its id. Without any, documents print plainly
in Tally's own look, with the seller's name where the logo would be.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.documents.texts import TEXTS

_FILE = "brand.yaml"
_LOGOS = {".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_FONTS = {".ttf", ".otf", ".ttc", ".otc"}
Colour = Annotated[str, StringConstraints(pattern=r"^#[0-9a-fA-F]{6}$")]


class BrandError(ValueError):
    """A brand folder that cannot be used: which file, what was expected, what came."""


@dataclass(frozen=True, slots=True)
class Brand:
    """What a document looks like. Lengths are typst's: ``11mm``, ``32pt``."""

    #: Of titles and rules, and of what stands out; None: the legal entity's.
    primary: str | None = None
    accent: str | None = None
    #: The logo's media type and its bytes.
    logo: tuple[str, bytes] | None = None
    logo_height: str = "11mm"
    paper: Literal["a4", "us-letter"] = "a4"
    font: str = "Inter"
    #: Folders of further fonts: the brand's, and for scripts that Inter has no letters of.
    font_folders: tuple[Path, ...] = ()
    #: Lines at the foot of every page; where empty, the seller's name, address and numbers.
    footer: tuple[str, ...] = ()
    #: Where a customer finds a document's events, with {number} and {id} to be filled in.
    detail_url: str = ""
    #: Whether the usage behind the lines is printed on pages of its own.
    annex: bool = True
    #: Words by language that replace Tally's or, whole, add a language.
    words: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    #: Text of a typst file that takes the place of Tally's template; it is given the same data.
    template: str | None = None


class _File(BaseModel):
    """``brand.yaml`` as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    primary: Colour | None = None
    accent: Colour | None = None
    logo: str | None = None
    logo_height: Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(mm|cm|pt|in)$")] = "11mm"
    paper: Literal["a4", "us-letter"] = "a4"
    font: str = "Inter"
    footer: tuple[str, ...] = Field((), max_length=4)
    detail_url: str = ""
    annex: bool = True
    words: dict[str, dict[str, str]] = Field(default_factory=dict)
    template: str | None = None

    @model_validator(mode="after")
    def _known_words(self) -> "_File":
        known = set(TEXTS["en"])
        for tag, words in self.words.items():
            if unknown := sorted(set(words) - known):
                raise ValueError(f"words.{tag}: no such words: {', '.join(unknown)}")
            if tag not in TEXTS and (missing := sorted(known - set(words))):
                raise ValueError(f"words.{tag}: a new language needs every word, missing: {', '.join(missing)}")
        return self


def load_brand(folder: Path | None, legal_entity: str = "") -> Brand:
    """The brand in ``folder/<legal entity>``, else in ``folder``; Tally's own look without a folder.

    Raises BrandError for a folder without ``brand.yaml``, a mistake in it, or a file it names that is not there.
    """
    if folder is None:
        return Brand()
    own = folder / legal_entity
    if legal_entity and own.parent == folder and (own / _FILE).is_file():
        folder = own
    path = folder / _FILE
    try:
        written = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        raise BrandError(f"{folder}: expected a {_FILE}, found none") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BrandError(f"{path}: expected YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}".lstrip(": ") for one in error.errors())
        raise BrandError(f"{path}: {problems}") from error
    fonts = folder / "fonts"
    return Brand(
        primary=written.primary,
        accent=written.accent,
        logo=_logo(folder, written.logo),
        logo_height=written.logo_height,
        paper=written.paper,
        font=written.font,
        font_folders=(fonts,) if fonts.is_dir() and any(f.suffix.lower() in _FONTS for f in fonts.iterdir()) else (),
        footer=written.footer,
        detail_url=written.detail_url,
        annex=written.annex,
        words=MappingProxyType({tag: MappingProxyType(words) for tag, words in written.words.items()}),
        template=None if written.template is None else _read(folder, written.template).decode(),
    )


def _logo(folder: Path, name: str | None) -> tuple[str, bytes] | None:
    if name is None:
        return None
    media_type = _LOGOS.get(Path(name).suffix.lower())
    if media_type is None:
        raise BrandError(f"{folder / _FILE}: logo: expected a file ending in {', '.join(_LOGOS)}, got {name}")
    return media_type, _read(folder, name)


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise BrandError(f"{folder / _FILE}: cannot read {name}: {error.strerror}") from error
