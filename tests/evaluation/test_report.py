"""Reports show what was recorded, leave out what was not, and stand on their own."""

import html.parser
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlab_jax.errors import InputError
from vlab_jax.evaluation import report, sheets
from vlab_jax.evaluation.retrieval_metrics import retrieval_metrics
from vlab_jax.runtime.metrics import MetricWriter


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
    metrics = retrieval_metrics(np.eye(12), np.arange(12))
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


def is_colour(pixels: np.ndarray, colour: str) -> np.ndarray:
    return (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1)


def test_the_report_shows_table_plots_and_sheets_and_stands_on_its_own(tmp_path):
    record(tmp_path)
    folder = tmp_path / "report"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "sheet.png")
    index = report.write_page(folder, tmp_path / "metrics.jsonl", results(), {"Retrieval": "sheet.png"})
    page = Page(index.read_text(encoding="utf-8"))
    images = ["training.png", "results.png", "sheet.png"]
    assert page.sources == [source for image in images for source in (image, image)]
    assert all((folder / image).stat().st_size > 0 for image in images)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.rows[1] == ["", *["R@1", "R@5", "R@10", "MdR", "MnR"] * 2, "twin accuracy", "broken"]
    assert [row[0] for row in page.rows[2:]] == ["clip", "blend & <more>"]
    assert page.rows[3][-2:] == ["91.2", "nan"] and page.rows[2][-2:] == ["-", "-"]


def test_direction_headings_span_their_own_columns(tmp_path):
    text = report.write_page(tmp_path, tmp_path / "none.jsonl", results()).read_text()
    first_row = text[text.index("<tr>") : text.index("</tr>")]
    assert first_row == (
        '<tr><th></th><th colspan="5">text to video</th><th colspan="5">video to text</th><th></th><th></th>'
    )


def test_results_are_also_written_for_machines_and_for_markdown(tmp_path):
    report.write_page(tmp_path, tmp_path / "none.jsonl", results())
    text = (tmp_path / "results.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(stored) == list(results())
    assert stored["clip"] == results()["clip"]
    assert stored["blend & <more>"]["broken"] is None
    assert (tmp_path / "results.md").read_text() == report.format_markdown(results()) + "\n"


def test_what_was_not_recorded_is_left_out(tmp_path):
    index = report.write_page(tmp_path / "report", tmp_path / "none.jsonl", {})
    assert Page(index.read_text()).sources == []
    assert "No results." in index.read_text()
    assert sorted(p.name for p in index.parent.iterdir()) == ["index.html", "results.json", "results.md"]


def test_a_spoilt_metrics_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match="line 1"):
        report.write_page(tmp_path / "report", tmp_path / "metrics.jsonl", {})


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


def clip(values: list[int], size: int = 48) -> np.ndarray:
    """Frames of one grey value each."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), size, size, 3)).copy()


def sheet(path, queries, *, k=5, correct=None, ranks=None) -> np.ndarray:
    correct = np.zeros((len(queries), k), bool) if correct is None else correct
    scores = np.linspace(1, 0, len(queries) * k).reshape(len(queries), k)
    ranks = np.ones(len(queries), int) if ranks is None else ranks
    sheets.retrieval_sheet(path, queries, [[clip([90] * 8)] * k for _ in queries], correct, scores, ranks)
    return colours(path)


def test_the_right_clip_alone_is_framed_in_green(tmp_path):
    correct = np.zeros((3, 5), bool)
    correct[0, 1] = correct[2, 4] = True
    pixels = sheet(tmp_path / "sheet.png", ["a", "b", "c"], correct=correct)
    green = is_colour(pixels, sheets.GREEN)
    long_rows = np.flatnonzero(green.sum(axis=1) > 300)  # the upper and lower edges, 3 pixels thick
    assert 8 <= len(long_rows) <= 12
    first, second = green[long_rows[0]], green[long_rows[-1]]
    assert np.flatnonzero(first).max() < np.flatnonzero(second).min()
    assert not is_colour(sheet(tmp_path / "none.png", ["a", "b", "c"]), sheets.GREEN).any()


def test_frames_are_drawn_unchanged_and_in_order_at_their_own_size(tmp_path):
    values = np.linspace(20, 200, 8).astype(int).tolist()
    sheets.retrieval_sheet(
        tmp_path / "sheet.png", ["a"], [[clip(values)]], np.array([[False]]), np.array([[0.5]]), np.array([1])
    )
    pixels = colours(tmp_path / "sheet.png")
    counts = [((pixels == value).all(axis=2)).sum() for value in values]
    assert all(47 * 47 <= count <= 49 * 49 for count in counts)
    columns = [np.flatnonzero((pixels == value).all(axis=2).sum(axis=0) > 40).min() for value in values]
    assert columns == sorted(columns)


@pytest.mark.parametrize(("frames", "shown"), [(1, 1), (8, 8), (20, 8)])
def test_a_strip_holds_at_most_eight_frames_first_and_last_among_them(frames, shown):
    strip = sheets.strip(clip(list(range(frames))))
    values = strip[0, ::49, 0].tolist()
    assert len(values) == shown and strip.shape == (48, 49 * shown - 1, 3)
    assert values[0] == 0 and values[-1] == frames - 1 and values == sorted(values)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=400))
def test_wrapped_lines_fit_and_lose_no_letter_before_the_ellipsis(text):
    lines = sheets.wrap(text, 34, 8)
    assert len(lines) <= 8 and all(len(line) <= 34 for line in lines)
    printable = "".join(letter for letter in text if letter.isprintable())
    letters, drawn = "".join(printable.split()), "".join("".join(lines).split())
    assert drawn == letters or letters.startswith(drawn.removesuffix("…"))


def test_text_of_long_captions_stays_out_of_the_clips_and_of_the_next_row(tmp_path):
    long = " ".join(["vanishing"] * 60)
    pixels = sheet(tmp_path / "sheet.png", [long, long], ranks=np.array([1, 17]))
    left = np.flatnonzero((pixels == 90).all(axis=(2)).any(axis=0)).min()  # where the clips begin
    gutter = pixels[:, left - 12 : left - 2]
    assert (gutter == 255).all()
    written = (pixels[:, : left - 2] < 200).any(axis=(1, 2))
    assert np.flatnonzero(np.diff(written.astype(int)) == 1).size == 2 * (8 + 1)  # 8 lines and a note for each query


def test_a_higher_row_keeps_room_for_its_text(tmp_path):
    short = sheet(tmp_path / "short.png", ["a", "b"])
    tall = sheet(tmp_path / "tall.png", ["a", " ".join(["word"] * 60)])
    assert tall.shape[0] > short.shape[0] and tall.shape[1] == short.shape[1]


def test_a_sample_sheet_shows_frames_and_right_answers_in_green_and_wrong_ones_in_red(tmp_path):
    right = [("what moves?", sheets.INK), ("→ a bar  (right)", sheets.GREEN)]
    wrong = [("which way?", sheets.INK), ("→ left  (wrong, it is: right)", sheets.RED)]
    samples = [sheets.Sample(f"clip {i}", clip([90] * 4, 64), [*right, *wrong]) for i in range(2)]
    sheets.sample_sheet(tmp_path / "samples.png", samples)
    pixels = colours(tmp_path / "samples.png")
    assert (pixels == 90).all(axis=2).sum() == pytest.approx(2 * 4 * 64 * 64, rel=0.05)
    for colour in (sheets.GREEN, sheets.RED):
        rows = np.flatnonzero(is_colour(pixels, colour).any(axis=1))
        assert (np.diff(rows) > 20).sum() == 1  # one line a clip
    sheets.sample_sheet(tmp_path / "right.png", [sheets.Sample("clip", clip([90]), right)])
    assert not is_colour(colours(tmp_path / "right.png"), sheets.RED).any()


def sample_results() -> dict[str, dict[str, float]]:
    metrics = retrieval_metrics(np.eye(12), np.arange(12))
    return {"clip": metrics, "adapt": {**metrics, "twin_accuracy": 87.46}}


def test_the_text_table_is_aligned_and_marks_missing_figures():
    lines = report.format_table(sample_results()).splitlines()
    groups, headings, _, clip, adapt = lines
    names = "R@1 R@5 R@10 MdR MnR R@1 R@5 R@10 MdR MnR twin accuracy"
    assert headings.split() == names.split()
    assert clip.split() == ["clip", *["100.0"] * 3, "1.0", "1.0", *["100.0"] * 3, "1.0", "1.0", "-"]
    assert adapt.split()[-1] == "87.5"
    assert len(headings) == len(clip) == len(adapt)
    # Each direction's name begins over its own first column, and not over one before.
    for name, occurrence in (("text to video", 0), ("video to text", 1)):
        column_end = [i for i in range(len(headings)) if headings.startswith("R@1 ", i)][occurrence] + 3
        assert column_end - len("100.0") == groups.index(name)


def test_directions_do_not_run_into_each_other_over_single_columns():
    text = report.format_table({"a": {"text_to_video/R@1": 1.0, "video_to_text/R@1": 2.0, "twin": 3.0}})
    assert text.splitlines()[0].split() == ["text", "to", "video", "video", "to", "text"]
    assert len({len(line) for line in text.splitlines()[1:]}) == 1


def test_the_markdown_table_says_the_direction_in_each_heading():
    lines = report.format_markdown(sample_results()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1] == "text to video R@1" and cells[0][6] == "video to text R@1"
    assert cells[2][0] == "clip" and cells[2][-1] == "-"
    assert {len(row) for row in cells} == {12}


def test_no_results_make_a_table_that_says_so():
    assert report.format_table({}) == report.format_markdown({}) == "(no results)"
