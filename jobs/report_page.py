"""A report's page: one HTML file that needs nothing else, neither scripts nor the network.

The template escapes every text; what a chart shows is worked out here.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from jobs.data.face_samples import Sample
from jobs.data.prevalence import LabelCounts
from jobs.data.schema import FAILED, STATUSES, Status
from jobs.data.snapshots import Snapshot
from jobs.data.table_statistics import Histogram, TableStatistics
from mgmtn.attributes import GROUP_ATTRIBUTES
from mgmtn.drawing import GROUP_COLOURS

_PICTURE_SIDE: Final = 560  # pixels; a sample is shown at half of it, for screens of double density
_SIGMAS: Final = 2.0  # of a change that chance alone makes once in twenty
_MEANING: Final[dict[str, str]] = {
    Status.OK: "one row for each face",
    Status.NO_FACE: "no face was found",
    Status.FETCH_ERROR: "could not be read; tried again",
    Status.DECODE_ERROR: "damaged",
    Status.UNSUPPORTED: "of no format that is read",
    Status.TOO_LARGE: "above the limits on bytes or pixels",
    Status.TOO_SMALL: "below the limit on pixels",
    Status.MODEL_ERROR: "the model gave no finite answer; tried again",
    Status.CRASHED: "took its process down; tried again",
}


@dataclass(frozen=True)
class Attribute:
    """How common one attribute is, as shares from 0 to 1; `before` is None without an earlier snapshot.

    `chance` is what the shares may differ by if nothing has changed, at two standard errors, were the faces of the two
    snapshots drawn apart; since most of them are the same, it is rather too large.
    """

    name: str
    group: str
    share: float
    before: float | None
    chance: float

    @property
    def change(self) -> float:
        return 0.0 if self.before is None else self.share - self.before

    @property
    def is_notable(self) -> bool:
        return abs(self.change) > self.chance


def attributes(now: LabelCounts, before: LabelCounts | None) -> list[Attribute]:
    """The attributes group by group; none where no face has labels."""
    shares, earlier = now.shares, before.shares if before else {}
    found = []
    for group, names in GROUP_ATTRIBUTES.items():
        for name in names if shares else ():
            faces = (now.faces, before.faces) if before and earlier else ()
            pooled = shares[name] if not faces else (shares[name] * now.faces + earlier[name] * faces[1]) / sum(faces)
            chance = _SIGMAS * (pooled * (1 - pooled) * sum(1 / count for count in faces)) ** 0.5
            found.append(Attribute(name, group, shares[name], earlier.get(name), chance))
    return found


@dataclass(frozen=True)
class Outcome:
    """Images with one status; `kind` chooses the colour."""

    status: str
    count: int
    share: float
    before: float | None
    meaning: str
    kind: str


def outcomes(now: Mapping[str, int], before: Mapping[str, int] | None) -> list[Outcome]:
    """Every status that occurs in one of two snapshots."""
    total, earlier = sum(now.values()), sum((before or {}).values())
    return [
        Outcome(
            status=status,
            count=now.get(status, 0),
            share=now.get(status, 0) / total if total else 0.0,
            before=(before or {}).get(status, 0) / earlier if earlier else None,
            meaning=_MEANING[status],
            kind="failed" if status in FAILED else status,
        )
        for status in STATUSES
        if now.get(status) or (before or {}).get(status)
    ]


def bars(histogram: Histogram) -> list[dict[str, Any]]:
    """A histogram's bars in percent of the chart: `x`, `width`, `height`, and a `title` to read on hover."""
    top, count = max(int(histogram.counts.max()), 1), len(histogram.counts)
    return [
        {
            "x": 100 * number / count,
            "width": 100 / count - 0.6,
            "height": 100 * int(value) / top,
            "title": f"{short(low)} to {short(high)} {histogram.unit}: {int(value):,}".replace(" :", ":"),
        }
        for number, (value, low, high) in enumerate(
            zip(histogram.counts, histogram.edges[:-1], histogram.edges[1:], strict=True)
        )
    ]


def render(
    *,
    labels: str,
    snapshot: Snapshot,
    before: Snapshot | None,
    counts: LabelCounts,
    counts_before: LabelCounts | None,
    statistics: TableStatistics,
    samples: Sequence[Sample],
    masks_missing: str,
    history: Sequence[Snapshot],
    made_at: str,
) -> str:
    """The page.

    Args:
        labels: the table's URI.
        snapshot: what is reported.
        before: what it is compared with; None without one.
        counts: labels of `snapshot`.
        counts_before: labels of `before`.
        statistics: of the rows of `snapshot`.
        samples: images to show.
        masks_missing: why no masks are shown; empty where they are.
        history: the latest snapshots, oldest first.
        made_at: date and time, for the reader.
    """
    # keep_trailing_newline off, undefined names an error: a page with a hole would look like an answer.
    environment = Environment(
        loader=PackageLoader("jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points, "short": short, "bytes": in_bytes, "clean": clean}
    environment.filters |= {"words": words, "picture": picture, "commas": lambda number: f"{number:,}"}
    found = attributes(counts, counts_before)
    return environment.get_template("report.html.jinja").render(
        labels=labels,
        snapshot=snapshot,
        before=before,
        counts=counts,
        attributes=found,
        drifted=sorted(found, key=lambda attribute: -abs(attribute.change))[:15] if counts_before else [],
        groups={group: f"rgb{colour}" for group, colour in GROUP_COLOURS.items()},
        outcomes=outcomes(snapshot.images, before.images if before else None),
        problems=[problem for status in STATUSES for problem in statistics.problems.get(status, ())],
        histograms=[(histogram, bars(histogram)) for histogram in statistics.histograms.values()],
        samples=samples,
        masks_missing=masks_missing,
        history=history,
        most_faces=max((earlier.faces for earlier in history), default=0) or 1,
        made_at=made_at,
    )


def percent(share: float | None) -> str:
    """A share from 0 to 1 in percent; small ones are not rounded away."""
    if share is None:
        return "–"
    return f"{100 * share:.2f} %" if 0 < share < 0.01 else f"{100 * share:.1f} %"


def points(change: float) -> str:
    """A change of a share in percentage points, signed."""
    return f"{100 * change:+.1f}".replace("-", "−")


def short(number: float | None) -> str:
    """A number in three digits."""
    return "–" if number is None else f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def in_bytes(count: int) -> str:
    """Bytes in the unit that suits them."""
    size = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1024:
            return f"{short(size)} {unit}"
        size /= 1024
    return f"{short(size)} TB"


def words(name: str) -> str:
    """An attribute's name, or a group's, for a reader."""
    return name.replace("five_o_clock", "five o'clock").replace("_", " ")


def clean(text: str | None) -> str:
    """A text from outside without what could reorder or hide a line: controls, and marks of writing direction."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text or "")


def picture(image: Image.Image) -> str:
    """An image as a `data:` URI, made small; JPEG, which drops what else its file said."""
    small = image.copy()
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
