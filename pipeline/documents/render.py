"""Many documents to PDF files: by several processes, each with its fonts and template loaded once."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pipeline.documents.brand import load_brand
from pipeline.documents.einvoice import NotRepresentable, cii_xml
from pipeline.documents.files import file_name, title, write
from pipeline.documents.model import Document
from pipeline.documents.pdf import Renderer, RenderError
from pipeline.documents.read import NotReadable, read_each
from pipeline.infra.postgres import connect

#: Documents a process takes at a time: some seconds of work, so that the last ones end together.
_CHUNK = 50


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a document: a file, or the problem that stood in its way."""

    name: str
    path: Path | None = None
    #: Whether the file's content is new.
    changed: bool = False
    #: Why it holds no e-invoice; empty where it does.
    no_e_invoice: str = ""
    problem: str = ""


class Maker:
    """Makes PDFs of documents of any legal entity, with the e-invoice inside where there can be one."""

    def __init__(self, branding: Path | None) -> None:
        self._branding = branding
        self._renderers: dict[str, Renderer] = {}

    def pdf(self, document: Document) -> tuple[bytes, str]:
        """The PDF, and why it holds no e-invoice (empty where it does). Raises RenderError, BrandError."""
        try:
            xml, why = cii_xml(document), ""
        except NotRepresentable as error:
            xml, why = None, str(error)
        return self._renderer(document.seller.id).pdf(document, xml), why

    def _renderer(self, legal_entity: str) -> Renderer:
        if legal_entity not in self._renderers:
            self._renderers[legal_entity] = Renderer(load_brand(self._branding, legal_entity))
        return self._renderers[legal_entity]


def write_pdfs(
    dsn: str, ids: Sequence[int], folder: Path, *, branding: Path | None = None, workers: int = 1
) -> Iterator[Made]:
    """Write the documents with these ids into a folder, in order; tell of each as it is done.

    What is there already, unchanged, is left as it is, so a run that was cut short goes on with the next. Raises
    NotWritten when a file cannot be written (the disk is full), BrandError, psycopg.OperationalError.
    """
    chunks = [list(ids[start : start + _CHUNK]) for start in range(0, len(ids), _CHUNK)]
    if workers == 1 or len(chunks) <= 1:
        _start_worker(branding)
        yield from chain.from_iterable(_write_chunk(dsn, chunk, folder) for chunk in chunks)
        return
    # Not by fork: a child would begin with copies of this process's connections and of typst's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(chunks)), context, _start_worker, (branding,)) as pool:
        try:
            yield from chain.from_iterable(pool.map(_write_chunk, [dsn] * len(chunks), chunks, [folder] * len(chunks)))
        finally:
            pool.shutdown(cancel_futures=True)


_maker: Maker


def _start_worker(branding: Path | None) -> None:
    global _maker
    _maker = Maker(branding)


def _write_chunk(dsn: str, ids: Sequence[int], folder: Path) -> list[Made]:
    with connect(dsn, application="documents") as connection:
        return [_write_one(document, folder) for document in read_each(connection, ids)]


def _write_one(document: Document | NotReadable, folder: Path) -> Made:
    if isinstance(document, NotReadable):
        return Made(document.name, problem=str(document))
    name = title(document)
    try:
        content, why = _maker.pdf(document)
    except RenderError as error:
        return Made(name, problem=str(error))
    path = folder / file_name(document, "pdf")
    return Made(name, path, changed=write(path, content), no_e_invoice=why)
