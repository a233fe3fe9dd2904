"""The `motion` data set: twins, truth of the words, balance, separation of the splits, determinism."""

import collections
import dataclasses
import hashlib
import io
import itertools
import re

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlab_jax.datasets.motion import dataset
from vlab_jax.datasets.motion.dataset import (
    CONFIGS,
    MotionConfig,
    held_out_scenes,
    is_held_out,
    still_clips,
    video_clips,
)
from vlab_jax.datasets.motion.render import PALETTE, encode_video, render, render_background
from vlab_jax.datasets.motion.scene import (
    ANGLE,
    BACKGROUNDS,
    COLOURS,
    FAMILY,
    FRAMES,
    INVERSE,
    KINDS,
    MOTIONS,
    OPACITY,
    RADIUS,
    REACH,
    TURNING,
    Scene,
    Shape,
    X,
    Y,
    draw_scene,
)
from vlab_jax.datasets.motion.text import PHRASES, captions, place, questions, relation, twin_questions
from vlab_jax.errors import InputError

SMALL = MotionConfig(name="small", train=12, validation=8, test=8)
seeds = st.integers(0, 2**32 - 1)


def decode(media: bytes) -> np.ndarray:
    with av.open(io.BytesIO(media)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def scene_of(seed: int, events: int | None = None) -> Scene:
    weights = (0.25, 0.75) if events is None else [0.0] * (events - 1) + [1.0]
    return draw_scene(np.random.default_rng(seed), weights)


def story_of(caption: str) -> list[tuple[Shape, str]]:
    """The story of a caption, parsed by rules of this test: words, perfects, 'before', 'it'."""
    spoken = []
    subject = None
    phrases = {form: (motion, i) for motion, rows in PHRASES.items() for row in rows for i, form in enumerate(row)}
    noun = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(KINDS)})"
    alternatives = "|".join(sorted(map(re.escape, phrases), key=len, reverse=True))
    for match in re.finditer(rf"(?P<noun>{noun})|\b(?P<phrase>{alternatives})\b", caption):
        if match["noun"]:
            subject = Shape(*match["noun"].split())
        else:
            motion, perfect = phrases[match["phrase"]]
            spoken.append((perfect == 0, subject, motion))
    if caption.startswith("before"):
        spoken = [*spoken[1:], spoken[0]]
    return [(shape, motion) for _, shape, motion in sorted(spoken, key=lambda clause: clause[0])]


@pytest.fixture(scope="module")
def pairs() -> list:
    clips = list(video_clips(SMALL, "test"))
    return list(zip(clips[::2], clips[1::2], held_out_scenes(SMALL)["test"], strict=True))


@pytest.fixture(scope="module")
def sample() -> list[tuple[Scene, tuple]]:
    rng = np.random.default_rng(7)
    scenes = [draw_scene(rng) for _ in range(7000)]
    return [(scene, questions(scene, rng)) for scene in scenes]


def test_decoded_frames_of_a_twin_are_those_of_the_clip_in_reverse_bit_for_bit(pairs):
    for clip, twin, _ in pairs:
        frames = decode(clip.media)
        np.testing.assert_array_equal(decode(twin.media), frames[::-1])
        assert (frames[0] != frames[-1]).any(), "a clip in which nothing happens cannot test this"


def test_a_clip_is_24_independent_frames_at_12_a_second(pairs):
    media, scene = pairs[0][0].media, pairs[0][2]
    with av.open(io.BytesIO(media)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert stream.average_rate == 12 and stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert len(packets) == FRAMES and all(packet.is_keyframe for packet in packets)
    frames = decode(media)
    assert frames.shape == (FRAMES, 48, 48, 3)
    assert np.abs(frames.astype(int) - render(scene)).mean() < 5


@pytest.mark.parametrize("events", [1, 2])
@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_a_reversed_scene_renders_to_the_reversed_frames(events, seed):
    scene = scene_of(seed, events)
    reversed_scene = scene.reversed()
    forward, backward = render(scene).astype(int), render(reversed_scene).astype(int)
    assert np.abs(forward - backward[::-1]).max() <= 1
    assert reversed_scene.story() != scene.story()
    assert reversed_scene.reversed().story() == scene.story()


@pytest.mark.parametrize("events", [1, 2])
@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_shapes_stay_inside_the_frame_apart_and_unlike(events, seed):
    scene = scene_of(seed, events)
    states = scene.states()
    reach = REACH * states[..., RADIUS]
    for column in (X, Y):
        assert (states[..., column] - reach > 0).all() and (states[..., column] + reach < 1).all()
    if len(scene.shapes) == 2:
        one, other = scene.shapes
        assert one.colour != other.colour and one.kind != other.kind
        gap = np.hypot(*(states[0] - states[1])[:, [X, Y]].T)
        assert (gap > reach.sum(axis=0) - 0.02).all()


@settings(max_examples=100, deadline=None)
@given(seed=seeds)
def test_no_shape_repeats_or_undoes_a_motion_or_acts_while_invisible(seed):
    scene = scene_of(seed, 2)
    for shape in set(scene.shapes):
        motions = [motion for actor, motion in scene.story() if actor == shape]
        assert len({FAMILY[motion] for motion in motions}) == len(motions)
        assert "appear" not in motions[1:] and "vanish" not in motions[:-1]
        assert shape.kind in TURNING or not {"clockwise", "anticlockwise"} & set(motions)


@pytest.fixture(scope="module")
def lone_bars() -> dict[str, Scene]:
    """For each motion a scene of one shape that does nothing else: a bar, as its angle can be measured."""
    scenes: dict[str, Scene] = {}
    for seed in itertools.count():
        scene = scene_of(seed, events=1)
        if len(scene.shapes) == 1 and scene.shapes[0].kind == "bar":
            scenes[scene.events[0].motion] = scene
        if len(scenes) == len(MOTIONS):
            return scenes


@pytest.mark.parametrize("motion", MOTIONS)
def test_pixels_do_what_the_motion_says(motion, lone_bars):
    scene = lone_bars[motion]
    ground = render_background(scene.background, scene.background_seed, 48)
    weight = np.abs(render(scene).astype(float) - ground[None]).sum(axis=-1)
    weight[weight < 24] = 0
    area = (weight > 0).sum(axis=(1, 2))
    if FAMILY[motion] == "presence":
        first, last = area[:2].sum(), area[-2:].sum()
        assert (first < last) if motion == "appear" else (first > last)
        return
    rows, columns = np.mgrid[:48, :48]
    x, y = ((weight * axis).sum(axis=(1, 2)) / weight.sum(axis=(1, 2)) for axis in (columns, rows))
    moved = np.array([x[-1] - x[0], y[-1] - y[0]])
    expected = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(motion, (0, 0))
    if any(expected):
        assert moved @ expected > 12 and abs(moved[::-1] @ expected) < 1
    else:
        assert np.abs(moved).max() < 1
    growth = area[-1] / area[0]
    assert {"grow": growth > 2, "shrink": growth < 0.5}.get(motion, 0.7 < growth < 1.4)
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    xx, yy, xy = ((weight * product).sum(axis=(1, 2)) for product in (dx * dx, dy * dy, dx * dy))
    # The axis of a bar from its moments: twice the angle is unambiguous, and rises when it turns clockwise.
    turned = np.degrees(np.unwrap(np.arctan2(2 * xy, xx - yy)) / 2)
    turned = turned[-1] - turned[0]
    assert {"clockwise": turned > 60, "anticlockwise": turned < -60}.get(motion, abs(turned) < 10)


def test_eight_frames_show_the_direction_of_every_turn():
    rng = np.random.default_rng(3)
    for scene in (draw_scene(rng, (0.0, 1.0)) for _ in range(300)):
        for event in scene.events:
            if FAMILY[event.motion] == "turn":
                total = np.ptp(scene.tracks[event.shape, :, ANGLE])
                # Four of eight frames fall into one of two events; a quarter turn of a bar is ambiguous.
                assert scene.shapes[event.shape].kind == "bar"
                assert total / 4 < np.pi / 2
                assert total > np.radians(100)


@pytest.mark.parametrize("events", [1, 2])
@settings(max_examples=60, deadline=None)
@given(seed=seeds, wording=seeds)
def test_every_caption_has_the_whole_story_and_nothing_else(events, seed, wording):
    scene = scene_of(seed, events)
    said = captions(scene, np.random.default_rng(wording))
    assert len(set(said)) == 4
    for caption in said:
        assert story_of(caption) == list(scene.story()), caption
        assert caption == caption.lower()


@settings(max_examples=60, deadline=None)
@given(seed=seeds, wording=seeds)
def test_twins_worded_alike_swap_each_motion_for_its_inverse_in_the_same_words(seed, wording):
    scene = scene_of(seed)
    both = [captions(one, np.random.default_rng(wording)) for one in (scene, scene.reversed())]
    pairs = [questions(one, np.random.default_rng(wording)) for one in (scene, scene.reversed())]
    for own, twin in zip(*both, strict=True):
        assert story_of(twin) == [(shape, INVERSE[motion]) for shape, motion in reversed(story_of(own))]
        assert len(own.split()) == len(twin.split())
    assert [q.type for q in pairs[0]] == [q.type for q in pairs[1]]
    for own, twin in zip(*pairs, strict=True):
        assert own.type != "motion" or (own.question == twin.question and own.answer != twin.answer)
        assert own.type != "appearance" or own == twin


def test_motion_questions_are_answered_truly(sample):
    seen = collections.Counter()
    for scene, pairs in sample:
        for q in (q for q in pairs if q.type == "motion"):
            shape = Shape(*re.search(r"the (\w+ \w+)", q.question)[1].split())
            motions = [motion for actor, motion in scene.story() if actor == shape]
            assert q.answer in motions or [q.answer] == [PHRASES[m][0][0] for m in motions], (q, scene.story())
            seen[q.question.split()[0]] += 1
    assert min(seen[word] for word in ("what", "which", "does")) > 100


def test_order_questions_are_answered_truly(sample):
    seen = collections.Counter()
    for scene, pairs in sample:
        for q in (q for q in pairs if q.type == "order"):
            assert q.answer in q.question
            if q.question.startswith("which shape"):
                assert q.answer == f"the {scene.story()[0][0].colour} {scene.story()[0][0].kind}"
            else:
                assert story_of(q.answer) == [scene.story()[0]]
                assert sorted(map(str, story_of(q.question))) == sorted(map(str, scene.story()))
            seen[q.question.split()[1]] += 1
    assert min(seen["happens"], seen["shape"]) > 100


def _is_chance(hits: int, count: int, chance: float) -> bool:
    """Within four standard deviations of `chance`."""
    return abs(hits - count * chance) < 4 * np.sqrt(count * chance * (1 - chance))


def _answers_to(question: str) -> int:
    """How many answers a motion question has."""
    if question.startswith("does"):
        return 2
    if question.startswith("which"):
        return 4
    kind = question.split()[4]
    return 10 if kind in TURNING else 8


def test_motion_answers_are_at_chance_given_the_question(sample):
    pairs = [q for _, questions_ in sample for q in questions_ if q.type == "motion"]
    known, new = pairs[::2], pairs[1::2]
    # The best guess from the same text, learnt on one half, is no better on the other.
    answers = collections.defaultdict(collections.Counter)
    for q in known:
        answers[q.question][q.answer] += 1
    for choices in (2, 4, 8, 10):
        guessed = [q for q in new if _answers_to(q.question) == choices and q.question in answers]
        hits = sum(answers[q.question].most_common(1)[0][0] == q.answer for q in guessed)
        assert len(guessed) > 60 and _is_chance(hits, len(guessed), 1 / choices)
    # Neither does any answer prevail in a form of question, whatever the shape.
    forms = collections.defaultdict(collections.Counter)
    for q in pairs:
        form = re.sub(rf"({'|'.join(COLOURS)}) ({'|'.join(KINDS)})", "shape", q.question)
        forms[form, _answers_to(q.question)][q.answer] += 1
    assert len(forms) >= 8
    for (_, choices), counts in forms.items():
        assert len(counts) == choices
        assert all(_is_chance(n, counts.total(), 1 / choices) for n in counts.values()), counts


def test_order_answers_are_at_chance_given_the_question(sample):
    pairs = [q for _, questions_ in sample for q in questions_ if q.type == "order"]
    for start in ("what", "which"):
        some = [q for q in pairs if q.question.startswith(start)]
        named_first = sum(q.question.index(q.answer) < len(q.question) // 2 for q in some)
        assert len(some) > 200 and _is_chance(named_first, len(some), 0.5)
    # Nor does what is named tell: each motion and each shape is the answer in half of its questions.
    named, right = collections.Counter(), collections.Counter()
    for q in pairs:
        words = set(COLOURS + KINDS) | {row[0][0] for row in PHRASES.values()}
        both = {word for word in words if word in q.question and word not in q.answer}
        only = {word for word in words if word in q.answer and q.question.count(word) == 1}
        named.update(both | only)
        right.update(only)
    assert len(named) == len(COLOURS) + len(KINDS) + len(MOTIONS)
    assert all(named[word] > 50 and _is_chance(right[word], named[word], 0.5) for word in named)


def test_twin_questions_offer_both_captions_in_one_order(pairs):
    for clip, twin, _ in pairs:
        own, other = ([q for q in c.questions if q.type == "twin"] for c in (clip, twin))
        assert len(own) == len(other) == 1
        assert own[0].options == other[0].options and own[0].question == other[0].question
        assert set(own[0].options) == {clip.captions[0], twin.captions[0]}
        assert own[0].answer == clip.captions[0] and other[0].answer == twin.captions[0]
    both = [twin_questions("a", "b", np.random.default_rng(seed)) for seed in range(400)]
    assert _is_chance(sum(own.options[0] == "a" for (own,), _ in both), len(both), 0.5)


def test_captions_of_a_pair_describe_the_scene_and_its_reversal(pairs):
    for clip, twin, scene in pairs:
        assert [story_of(caption) for caption in clip.captions] == [list(scene.story())] * 4
        assert [story_of(caption) for caption in twin.captions] == [list(scene.reversed().story())] * 4


def test_scenes_are_as_likely_as_their_reversals(sample):
    starts, ends = collections.defaultdict(list), collections.defaultdict(list)
    for scene, _ in sample:
        for i, event in enumerate(scene.events):
            starts[event.motion, i, len(scene.events)].append(scene.tracks[event.shape, i])
            ends[event.motion, i, len(scene.events)].append(scene.tracks[event.shape, i + 1])
    for motion, i, count in starts:
        here, mirrored = starts[motion, i, count], ends[INVERSE[motion], count - 1 - i, count]
        both = len(here) + len(mirrored)
        assert _is_chance(len(here), both, 0.5)
        for column in (X, Y, RADIUS, OPACITY):
            a, b = (np.array(some)[:, column] for some in (here, mirrored))
            spread = np.sqrt(a.var() / len(a) + b.var() / len(b))
            assert abs(a.mean() - b.mean()) <= 4.5 * spread + 1e-9, (motion, i, count, column)


def test_no_story_is_repeated_in_validation_and_test():
    config = dataclasses.replace(CONFIGS["video"], validation=60, test=120)
    scenes = held_out_scenes(config)
    assert (len(scenes["validation"]), len(scenes["test"])) == (30, 60)
    stories = [s.story() for both in scenes.values() for scene in both for s in (scene, scene.reversed())]
    assert len(set(stories)) == len(stories) == 180


@pytest.mark.parametrize("events", [1, 2])
def test_a_quarter_of_the_stories_is_held_out_and_training_has_only_the_others(events):
    scenes = [scene_of(seed, events) for seed in range(1500)]
    assert all(is_held_out(scene, 0) == is_held_out(scene.reversed(), 0) for scene in scenes)
    # Single events have 104 stories, 52 with their reversals.
    stories = {scene.story(): is_held_out(scene, 0) for scene in scenes}
    assert len(stories) == 104 if events == 1 else len(stories) > 500
    assert 0.15 < np.mean(list(stories.values())) < 0.35
    weights = (1.0,) if events == 1 else (0.0, 1.0)
    config = MotionConfig(name="few", train=60, validation=8, test=8, event_weights=weights)
    held = {s.story() for both in held_out_scenes(config).values() for s in both}
    train = {tuple(story_of(clip.captions[0])) for clip in video_clips(config, "train")}
    assert all(stories.get(story, True) for story in held)
    assert not any(stories.get(story, False) for story in train) and not held & train


def test_more_held_out_stories_than_there_are_is_refused_instead_of_searched_for(monkeypatch):
    monkeypatch.setattr(dataset, "_MAX_DRAWS", 500)
    config = MotionConfig(name="few", train=25, validation=200, test=200, event_weights=(1.0,))
    with pytest.raises(InputError, match=r"^motion/few: .* ask for fewer validation and test clips"):
        held_out_scenes(config)


def test_the_seed_decides_every_byte():
    def first(config: MotionConfig, split: str) -> list:
        return list(itertools.islice(video_clips(config, split), 4))

    other = dataclasses.replace(SMALL, seed=1)
    longer = dataclasses.replace(SMALL, train=99)
    for split in ("train", "test"):
        assert first(SMALL, split) == first(SMALL, split)
        assert first(SMALL, split) != first(other, split)
    assert first(SMALL, "train") == first(longer, "train")


@pytest.mark.parametrize(
    ("name", "split", "digest"),
    [
        ("video", "train", "87861bc7c652"),
        pytest.param("large", "test", "d59fcff20515", marks=pytest.mark.long),
        ("still", "train", "1f72e7379269"),
        ("glyphs", "train", "454fe201b446"),
        pytest.param("glyphs", "validation", "74c9d900d55b", marks=pytest.mark.long),
        ("glyphs_still", "test", "edb8a8cdffc5"),
    ],
)
def test_the_words_are_those_of_recorded_experiments(name, split, digest):
    clips = (still_clips if CONFIGS[name].still else video_clips)(CONFIGS[name], split)
    words = [
        (clip.id, clip.captions, [dataclasses.astuple(q) for q in clip.questions])
        for clip in itertools.islice(clips, 30)
    ]
    assert hashlib.sha256(repr(words).encode()).hexdigest()[:12] == digest


def test_an_encoded_clip_does_not_depend_on_what_was_encoded_before():
    frames = render(scene_of(1))
    media = encode_video(frames)
    encode_video(render(scene_of(2)))
    assert encode_video(frames) == media


def test_other_resolutions_show_the_same_scene():
    scene = scene_of(5)
    small, large = render(scene, 48), render(scene, 96)
    halved = large.reshape(FRAMES, 48, 2, 48, 2, 3).mean(axis=(2, 4))
    assert large.shape == (FRAMES, 96, 96, 3)
    assert np.abs(halved - small).mean() < 12
    assert decode(encode_video(large)).shape == large.shape


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_colour_stands_out_from_every_background(background):
    for seed in range(20):
        ground = render_background(background, seed, 48)
        contrast = np.ptp(ground, axis=(0, 1)).max()
        assert contrast == 0 if background == "plain" else 3 < contrast < 20
        for colour in PALETTE.values():
            assert np.linalg.norm(ground - np.array(colour), axis=-1).min() > 45


def test_stills_show_their_shapes_and_speak_of_nothing_that_moves():
    config = MotionConfig(name="stills", still=True, train=30, validation=4, test=4)
    verbs = {form for rows in PHRASES.values() for row in rows for form in row}
    for clip in still_clips(config, "train"):
        image = np.asarray(Image.open(io.BytesIO(clip.media)).convert("RGB")).astype(int)
        assert image.shape == (48, 48, 3) and len(set(clip.captions)) == 4
        for caption in clip.captions:
            assert not any(verb in caption for verb in verbs), caption
            named = {(colour, kind) for colour in COLOURS for kind in KINDS if f"{colour} {kind}" in caption}
            assert len(named) == len({c for c in COLOURS if c in caption}) in (1, 2)
            for colour, _ in named:
                near = np.linalg.norm(image - np.array(PALETTE[colour]), axis=-1) < 60
                assert near.sum() > 10, caption
        assert {q.type for q in clip.questions} == {"appearance"}
        count = [q.answer for q in clip.questions if q.question.startswith("how many")]
        assert count in ([], [str(len(named))])


@pytest.mark.parametrize(
    ("centre", "words"),
    [
        ((0.5, 0.53), "in the middle"),
        ((0.2, 0.5), "on the left"),
        ((0.8, 0.52), "on the right"),
        ((0.5, 0.2), "at the top"),
        ((0.25, 0.8), "at the bottom left"),
        ((0.75, 0.2), "at the top right"),
        ((0.3, 0.6), None),
    ],
)
def test_places_are_named_if_they_are_beyond_doubt(centre, words):
    assert place(np.array(centre)) == words


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ((0.2, 0.5), (0.8, 0.6), "to the left of"),
        ((0.8, 0.5), (0.2, 0.6), "to the right of"),
        ((0.5, 0.2), (0.6, 0.8), "above"),
        ((0.5, 0.8), (0.6, 0.2), "below"),
        ((0.2, 0.2), (0.8, 0.8), None),
    ],
)
def test_relations_are_named_if_they_are_beyond_doubt(one, other, words):
    assert relation(np.array(one), np.array(other)) == words
