"""The report: what it says of a table, how it takes hostile names and missing pictures, and that it stands alone."""

import html.parser
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.compact import CompactSettings
from jobs.compact import run as compact
from jobs.data.prevalence import LabelCounts
from jobs.data.snapshots import LabelTable
from jobs.report import ReportSettings, last_different, main, run
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.network import MGMTN, NetworkSettings

HOSTILE = "<script>alert(1)</script>\" onerror='x' \u202egpj.jpg"


class Page(html.parser.HTMLParser):
    """What a browser would see: elements, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[str]:
        return [found["alt"] or "" for tag, found in self.elements if tag == "img"]


@pytest.fixture
def photo(tmp_path: Path) -> str:
    """A picture of 100 x 80 pixels whose name is an attack."""
    folder = tmp_path / "photos"
    folder.mkdir()
    path = folder / HOSTILE.replace("/", "_")
    noise = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    return str(path)


@pytest.fixture
def labels(tmp_path: Path, photo: str, add_night) -> str:
    """Two nights: the second has another picture that is gone, one without a face and one that failed."""
    uri = str(tmp_path / "labels")
    box = {"box_x2": 60.0, "box_y1": 10.0, "box_y2": 70.0, "etag": None, "detection_score": 0.75, "sharpness": 99.0}
    points_68 = np.stack([np.linspace(20, 60, 68), np.linspace(20, 60, 68) ** 0.9], axis=1).ravel().tolist()
    add_night(uri, {photo: 5}, run_id="r1", **box, landmarks=points_68)
    add_night(uri, {"/gone.jpg": 1, "/empty.jpg": "no_face", f"/{HOSTILE}": "decode_error"}, run_id="r2", **box)
    return uri


def page_of(labels: str, tmp_path: Path, **settings: object) -> tuple[str, Page]:
    output = tmp_path / "report.html"
    run(ReportSettings(labels=labels, output=str(output), **settings))
    text = output.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_stands_alone_and_runs_nothing(labels, tmp_path):
    text, page = page_of(labels, tmp_path)
    assert not [found for tag, found in page.elements if tag in ("script", "link", "iframe", "object", "a", "base")]
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    sources = [value or "" for _, found in page.elements for name, value in found.items() if name in ("src", "href")]
    assert sources
    assert all(re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", source) for source in sources)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?:", text)


def test_names_are_shown_as_they_are_and_not_obeyed(labels, tmp_path):
    text, page = page_of(labels, tmp_path)
    assert "<script" not in text
    assert "<script>alert(1)</script>\" onerror='x' " in page.text
    assert "\u202e" not in text  # would show the name's end backwards


def test_a_missing_picture_is_said_and_the_others_are_shown(labels, tmp_path):
    _, page = page_of(labels, tmp_path)
    sample, *faces = page.pictures()
    assert sample in ("sample 1", "sample 2")
    assert faces == ["face 0, aligned", "face 1, aligned", "face 2, aligned"]
    assert "and 2 more faces" in page.text
    assert "Cannot be shown: no such file: '/gone.jpg'" in page.text
    assert "1 face in the table" in " ".join(page.text.split())


def test_a_picture_that_was_replaced_is_not_shown_with_old_boxes(tmp_path, photo, add_night):
    add_night(str(tmp_path / "labels"), {photo: 1}, box_x2=60.0, box_y1=1.0, box_y2=70.0, etag="of another content")
    _, page = page_of(str(tmp_path / "labels"), tmp_path)
    assert page.pictures() == []
    assert "changed since it was inventoried" in page.text


def test_masks_come_from_the_model_that_labelled(tmp_path, labels, photo, add_night):
    torch.manual_seed(0)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64)
    model = Checkpoint.of(MGMTN(network), Card(name="tiny", kind="attributes", network=network))
    path = str(model.save(tmp_path / "model"))
    _, page = page_of(labels, tmp_path, model=path)
    assert f"--model is {model.card.model_id}, which labelled nothing" in page.text
    assert "its masks" not in page.pictures()
    own = str(tmp_path / "own")
    add_night(own, {photo: 1}, model_id=model.card.model_id, etag=None, box_x2=60.0, box_y1=1.0, box_y2=70.0)
    _, page = page_of(own, tmp_path, model=path)
    assert page.pictures() == ["sample 1", "face 0, aligned", "its masks"]
    assert "No masks" not in page.text


def test_without_the_model_the_page_says_why_there_are_no_masks(labels, tmp_path):
    _, page = page_of(labels, tmp_path, samples=0)
    assert "No masks: model m1 does not ship with this package" in page.text


def test_outcomes_counts_and_history_are_those_of_the_snapshot(labels, tmp_path):
    text = " ".join(page_of(labels, tmp_path)[1].text.split())
    assert "Face attributes, snapshot 2" in text
    assert "compared with snapshot 1" in text
    assert "decode_error 1 25.0 % 0.0 %" in text
    assert "m1: 4" in text
    earlier = " ".join(page_of(labels, tmp_path, snapshot=1)[1].text.split())
    assert "Face attributes, snapshot 1" in earlier
    assert "There is no earlier snapshot" in earlier


def test_drift_is_measured_against_the_last_snapshot_with_other_rows(tmp_path, add_night):
    uri = str(tmp_path / "labels")
    add_night(uri, {"/a": 5}, run_id="r1")
    add_night(uri, {"/b": 1}, run_id="r2", labels=0)
    compact(CompactSettings(labels=uri))
    text = " ".join(page_of(uri, tmp_path, samples=0)[1].text.split())
    assert "snapshot 3 " in text
    assert "compared with snapshot 1" in text
    assert "young 100.0 % 83.3 % −16.7" in text
    table = LabelTable(uri)
    first, second, third = table.history()
    # The same images may have got other labels.
    assert last_different(table, [first, second], third, _counts(6, young=6))[0] == second


def _counts(faces: int, **positives: int) -> LabelCounts:
    return LabelCounts(faces=faces, positives=dict.fromkeys(ATTRIBUTES, 0) | positives)


def test_the_path_is_what_stdout_gets(labels, tmp_path, capsys):
    output = tmp_path / "a b.html"
    assert main([labels, "--output", str(output), "--samples", "0"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert main([str(tmp_path / "none"), "--output", str(output)]) == 2
    assert "there is no label table" in capsys.readouterr().err
