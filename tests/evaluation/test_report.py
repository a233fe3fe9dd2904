"""Reports show what was recorded, leave out what was not, and stand on their own."""

import dataclasses
import html.parser
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlab_jax.errors import InputError
from vlab_jax.evaluation import report, retrieval
from vlab_jax.evaluation import sheets as contact_sheet
from vlab_jax.evaluation import sheets as drawing
from vlab_jax.evaluation import sheets as sample_sheet
from vlab_jax.runtime.metrics import MetricWriter

GREEN = (0x1A, 0x96, 0x41)


class Page(html.parser.HTMLParser):
    """Collects tags, links and the cells of the table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.rows, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()


def results() -> dict[str, dict[str, float]]:
    metrics = retrieval.retrieval_metrics(np.eye(12), np.arange(12))
    return {"clip": metrics, "blend & <more>": {**metrics, "twin_accuracy": 91.25, "broken": math.nan}}


def record(workdir) -> None:
    with MetricWriter(workdir) as writer:
        for step in range(1, 41):
            stage = "clip" if step <= 15 else "adapt"
            figures = {"loss/contrastive": 4 / step, "learning_rate/adapter": 1e-3, "clips_per_second": 9.0}
            writer.write(step, figures, stage=stage)
        writer.write(40, {"validation/captioning_loss": math.nan}, stage="adapt")


def colours(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def is_green(pixels: np.ndarray) -> np.ndarray:
    return (pixels == np.array(GREEN, np.uint8)).all(axis=-1)


def test_the_report_shows_table_plots_and_sheets_and_stands_on_its_own(tmp_path):
    record(tmp_path)
    folder = tmp_path / "report"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "sheet.png")
    sheets = {"Retrieval": folder / "sheet.png"}
    index = report.write_report(folder, tmp_path / "metrics.jsonl", results(), sheets=sheets)
    page = Page(index.read_text(encoding="utf-8"))
    images = ["training.png", "results.png", "sheet.png"]
    assert page.sources == [source for image in images for source in (image, image)]
    assert all((folder / image).stat().st_size > 0 for image in images)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.rows[1] == ["", *["R@1", "R@5", "R@10", "MdR", "MnR"] * 2, "twin accuracy", "broken"]
    assert [row[0] for row in page.rows[2:]] == ["clip", "blend & <more>"]
    assert page.rows[3][-2:] == ["91.2", "nan"] and page.rows[2][-2:] == ["-", "-"]


def test_direction_headings_span_their_own_columns(tmp_path):
    text = report.write_report(tmp_path, tmp_path / "none.jsonl", results()).read_text()
    first_row = text[text.index("<tr>") : text.index("</tr>")]
    assert first_row == (
        '<tr><th></th><th colspan="5">text to video</th><th colspan="5">video to text</th><th></th><th></th>'
    )


def test_results_are_also_written_for_machines_and_for_markdown(tmp_path):
    report.write_report(tmp_path, tmp_path / "none.jsonl", results())
    text = (tmp_path / "results.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(stored) == list(results())
    assert stored["clip"] == results()["clip"]
    assert stored["blend & <more>"]["broken"] is None
    assert (tmp_path / "results.md").read_text() == retrieval.format_markdown(results()) + "\n"


def test_what_was_not_recorded_is_left_out(tmp_path):
    index = report.write_report(tmp_path / "report", tmp_path / "none.jsonl", {})
    assert Page(index.read_text()).sources == []
    assert "No results." in index.read_text()
    assert sorted(p.name for p in index.parent.iterdir()) == ["index.html", "results.json", "results.md"]


def test_a_spoilt_metrics_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match="line 1"):
        report.write_report(tmp_path / "report", tmp_path / "metrics.jsonl", {})


def drawn_curves(records) -> dict[str, list[tuple[float, float]]]:
    figure = report.training_figure(records)
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for axes in figure.axes
        for line in axes.lines
    }


def test_curves_of_losses_and_rates_carry_the_recorded_values():
    records = [
        {
            "step": 1,
            "stage": "a",
            "loss": 3.0,
            "loss/captioning": 2.0,
            "learning_rate/adapter": 0.1,
            "time": 0.0,
        },
        {"step": 2, "stage": "a", "loss": None, "loss/captioning": 1.0, "grad_norm": 7.0},
        {"step": 2, "stage": "a", "validation/masked_lm_loss": 5.0, "learning_rate": 0.2},
    ]
    curves = drawn_curves(records)
    assert set(curves) == {"total", "captioning", "validation masked lm", "adapter", "all parameters"}
    assert curves["captioning"] == [(1, 2.0), (2, 1.0)]
    assert curves["total"][0] == (1, 3.0) and math.isnan(curves["total"][1][1])


def test_stages_are_named_above_bands_that_follow_on_each_other():
    records = [{"step": s, "stage": "clip" if s <= 10 else "adapt", "loss": 1.0} for s in range(1, 31)]
    axes = report.training_figure(records).axes[0]
    assert [text.get_text() for text in axes.texts] == ["clip", "adapt"]
    assert [text.get_position()[0] for text in axes.texts] == [5.0, 20.0]
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches] == [(0, 10), (10, 30)]


def test_bars_have_the_figures_heights_and_chance_stands_at_half():
    stages = {
        "adapt": {"text_to_video/R@1": 12.0, "text_to_video/R@5": 34.0},
        "blend": {"twin_accuracy": 88.0},
    }
    figure = report.results_figure(stages)
    recall, twins = figure.axes
    assert (recall.get_title(), twins.get_title()) == ("text to video", "twin accuracy")
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in recall.containers}
    assert heights["R@1"][0] == 12.0 and heights["R@5"][0] == 34.0
    assert math.isnan(heights["R@1"][1])
    (chance,) = twins.lines
    assert list(chance.get_ydata()) == [50, 50] and chance.get_label() == "chance"


@pytest.mark.parametrize("figures", [{}, {"a": {}}, {"a": {"loss": 3.0}}])
def test_no_figure_is_drawn_from_results_without_retrieval(figures):
    assert report.results_figure(figures) is None


def test_the_training_figure_shows_how_fast_it_went_and_what_it_waited_for():
    records = [{"step": n, "stage": "a", "loss": 1.0, "clips_per_second": 3.0 * n, "mfu": 0.1 * n} for n in (1, 2)]
    figure = report.training_figure(records)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "clips/s", "share"]
    assert [list(axes.lines[0].get_ydata()) for axes in figure.axes[1:]] == [[3.0, 6.0], [0.1, 0.2]]


def test_no_figure_is_drawn_from_records_without_anything_to_show():
    assert report.training_figure([{"step": 1, "stage": "a", "gradient_norm": 3.0}]) is None


def sheet(path, queries, *, size=48, frames=8, k=5, correct=None, **kwargs):
    rng = np.random.default_rng(0)
    clips = [[rng.integers(0, 120, (frames, size, size, 3), np.uint8) for _ in range(k)] for _ in queries]
    correct = np.zeros((len(queries), k), bool) if correct is None else correct
    scores = np.linspace(1, 0, len(queries) * k).reshape(len(queries), k)
    return colours(contact_sheet.retrieval_contact_sheet(path, queries, clips, correct, scores, **kwargs))


def test_the_right_clip_alone_is_framed_in_green(tmp_path):
    correct = np.zeros((3, 5), bool)
    correct[0, 1] = correct[2, 4] = True
    pixels = sheet(tmp_path / "sheet.png", ["a", "b", "c"], correct=correct)
    # Each frame is 3 pixels thick, above and below: rows with a long run of green.
    long_rows = [row for row in range(len(pixels)) if is_green(pixels[row]).sum() > 300]
    assert len(long_rows) == 2 * (3 + 3)
    first, second = long_rows[0], long_rows[6]
    assert np.flatnonzero(is_green(pixels[first])).max() < np.flatnonzero(is_green(pixels[second])).min()
    assert not is_green(sheet(tmp_path / "none.png", ["a", "b", "c"])).any()


def test_frames_are_drawn_unchanged_and_in_order_at_their_own_size(tmp_path):
    clip = np.zeros((8, 48, 48, 3), np.uint8)
    clip[:] = np.linspace(20, 200, 8).astype(np.uint8)[:, None, None, None]
    clip[..., 0] = 7
    path = tmp_path / "sheet.png"
    contact_sheet.retrieval_contact_sheet(path, ["a"], [[clip]], np.array([[False]]), np.array([[0.5]]))
    pixels = colours(path)
    inside = pixels[:, :, 0] == 7
    row = np.flatnonzero(inside.sum(axis=1) == 8 * 48)
    assert len(row) == 48
    drawn = pixels[row[0]][inside[row[0]]][:, 1].reshape(8, 48)
    np.testing.assert_array_equal(drawn, np.repeat(clip[:, 0, 0, 1:2], 48, axis=1))


@pytest.mark.parametrize(("frames", "shown"), [(1, 1), (8, 8), (20, 8)])
def test_a_strip_holds_at_most_eight_frames_first_and_last_among_them(frames, shown):
    clip = np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, 24, 24, 3))
    strip = np.asarray(drawing.strip(clip, 48))
    values = strip[0, ::49, 0].tolist()
    assert len(values) == shown and strip.shape == (48, 49 * shown - 1, 3)
    assert values[0] == 0 and values[-1] == frames - 1 and values == sorted(values)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=400))
def test_wrapped_lines_fit_and_lose_no_letter_before_the_ellipsis(text):
    font = drawing.font(14)
    lines = drawing.wrap(text, font, 270, 8)
    assert 1 <= len(lines) <= 8
    assert all(font.getlength(line) <= 270 for line in lines)
    letters, drawn = "".join(text.split()), "".join("".join(lines).split())
    assert drawn == letters or letters.startswith(drawn.removesuffix("…"))


def test_text_of_long_captions_stays_out_of_the_clips_and_of_the_next_row(tmp_path):
    long = " ".join(["vanishing"] * 60)
    pixels = sheet(tmp_path / "sheet.png", [long, long], ranks=np.array([1, 17]))
    text_end = drawing.MARGIN + contact_sheet._TEXT_WIDTH
    gutter = pixels[drawing.MARGIN + drawing.LINE + 6 :, text_end + 2 : text_end + drawing.GAP]
    # Only the separating line, one pixel high, crosses the gutter.
    assert ((gutter != 255).any(axis=(1, 2))).sum() <= 1
    written = (pixels[:, drawing.MARGIN : text_end] < 200).any(axis=(1, 2))
    blocks = np.flatnonzero(np.diff(written.astype(int)) == 1).size
    # The heading, then 8 lines and a note per query, each apart from the next.
    assert blocks == 1 + 2 * (8 + 1)


def test_a_higher_row_keeps_room_for_its_text(tmp_path):
    short = sheet(tmp_path / "short.png", ["a", "b"])
    tall = sheet(tmp_path / "tall.png", ["a", " ".join(["word"] * 60)])
    assert tall.shape[0] > short.shape[0] and tall.shape[1] == short.shape[1]


@pytest.mark.parametrize("change", ["queries", "clips", "ragged", "none"])
def test_a_sheet_of_uneven_parts_is_refused(tmp_path, change):
    clip = np.zeros((2, 8, 8, 3), np.uint8)
    queries, clips = ["a", "b"], [[clip, clip], [clip, clip]]
    flags, scores = np.zeros((2, 2), bool), np.zeros((2, 2))
    if change == "queries":
        queries = ["a"]
    elif change == "clips":
        clips = clips[:1]
    elif change == "ragged":
        clips = [[clip, clip], [clip]]
    else:
        queries, clips, flags, scores = [], [], flags[:0], scores[:0]
    with pytest.raises(ValueError, match=r"queries|every query"):
        contact_sheet.retrieval_contact_sheet(tmp_path / "sheet.png", queries, clips, flags, scores)


def samples(count: int) -> list[sample_sheet.Sample]:
    frames = np.full((4, 64, 64, 3), 90, np.uint8)
    answers = (("what moves?", "a bar", "a bar", True), ("which way?", "left", "right", False))
    return [
        sample_sheet.Sample(f"clip {i}", frames, ("one", "two", "three"), "a bar moves", answers) for i in range(count)
    ]


def test_a_sample_sheet_shows_frames_and_right_answers_in_green_and_wrong_ones_in_red(tmp_path):
    pixels = colours(sample_sheet.sample_sheet(tmp_path / "samples.png", samples(2)))
    assert (pixels == 90).all(axis=2).sum() == 2 * 4 * 64 * 64
    green, red = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in (drawing.GREEN, drawing.RED))
    for colour in (green, red):
        rows = np.flatnonzero((pixels == colour).all(axis=2).any(axis=1))
        assert (np.diff(rows) > 20).sum() == 1  # one line a clip
    one = samples(1)[0]
    right = dataclasses.replace(one, answers=one.answers[:1])
    pixels = colours(sample_sheet.sample_sheet(tmp_path / "right.png", [right]))
    assert not (pixels == red).all(axis=2).any()


def test_no_sample_is_no_sheet(tmp_path):
    with pytest.raises(ValueError, match="no sample"):
        sample_sheet.sample_sheet(tmp_path / "samples.png", [])
