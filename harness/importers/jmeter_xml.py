"""JMeter's results file in its XML form, read as a stream: no tree is built, however long the file is.

A `<httpSample>` is a request; those inside it (redirects, embedded resources) are parts of it and not counted again.
A `<sample>` that contains others is a controller: its children are the requests and it is left out. A document type or
an entity is refused: JMeter writes none, and they are how a small file becomes a large one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from xml.parsers import expat

from harness.importers.jmeter import JmeterSample
from harness.importers.source import LINE_BYTES_MAX, Lines, Unusable

REQUEST = "httpSample"
OTHER = "sample"
TEXTS = {"java.net.URL": "URL", "method": "method", "failureMessage": "failureMessage"}
TEXT_CHARS_MAX = 10_000  # of an address or a message
ATTRIBUTES = {
    "timeStamp": "ts", "elapsed": "t", "success": "s", "label": "lb", "responseCode": "rc", "responseMessage": "rm",
    "threadName": "tn", "bytes": "by", "Latency": "lt",
}  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Frame:
    """A sample whose end has not come yet."""

    tag: str
    attributes: dict[str, str]
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    contains_samples: bool = False


class XmlSamples:
    """The samples of one XML file."""

    def __init__(self, lines: Lines) -> None:
        self.containers = 0  # samples left out because they contain the requests
        self._lines = lines
        self._stack: list[_Frame] = []
        self._path: list[str] = []
        self._found: list[JmeterSample] = []
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.EntityDeclHandler = self._refuse

    def samples(self) -> Iterator[JmeterSample]:
        """Yield each request in the order in which they end. Raises Unusable."""
        fed = 0
        for piece in self._lines.chunks():
            fed += len(piece)
            self._feed(piece)
            if fed - self._parser.CurrentByteIndex > LINE_BYTES_MAX:
                raise Unusable(f"an element is longer than {LINE_BYTES_MAX:,} bytes: the file is damaged")
            found, self._found = self._found, []
            yield from found
        self._feed(b"", last=True)

    def _feed(self, piece: bytes, *, last: bool = False) -> None:
        try:
            self._parser.Parse(piece, last)
        except expat.ExpatError as fault:
            self._lines.line = fault.lineno
            cut = " (the test was stopped, or still runs)" if last else ""
            raise Unusable(
                f"is no XML ({expat.ErrorString(fault.code)}): the file is cut off or damaged{cut}"
            ) from None
        finally:
            self._lines.line = max(self._lines.line, self._parser.CurrentLineNumber)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._path and tag != "testResults":
            raise Unusable(f"the root is <{tag[:40]}>, that of a JTL is <testResults>", shape=True)
        self._path.append(tag)
        if tag in {REQUEST, OTHER}:
            if self._stack:
                self._stack[-1].contains_samples = True
            self._stack.append(_Frame(tag, attributes))

    def _text(self, text: str) -> None:
        name = TEXTS.get(self._path[-1]) if self._path else None
        if name and self._stack:
            texts = self._stack[-1].texts
            texts[name] = (texts.get(name, "") + text)[:TEXT_CHARS_MAX]

    def _end(self, tag: str) -> None:
        self._path.pop()
        if tag not in {REQUEST, OTHER}:
            return
        frame = self._stack.pop()
        if any(above.tag == REQUEST for above in self._stack):
            return  # a redirect or an embedded resource: a part of the request around it
        if frame.tag == OTHER and frame.contains_samples:
            self.containers += 1
            return
        for name in ("ts", "t", "s"):
            if name not in frame.attributes:
                raise Unusable(f"a <{tag}> lacks its attribute {name}", name)
        texts = {name: text.strip() for name, text in frame.texts.items()}
        self._found.append(
            JmeterSample(**{name: frame.attributes.get(short, "") for name, short in ATTRIBUTES.items()}, **texts)
        )

    def _refuse(self, *_: object) -> None:
        raise Unusable("declares a document type or an entity, which no JTL does", shape=True)
