"""Damaged media are decoded, or refused with a reason, and never crash or hang the process that decodes them."""

import os

import fuzz_media

COUNT = 40


def test_damaged_files_are_decoded_or_refused_with_a_reason_and_take_little():
    assets = os.environ.get("VLAB_TEST_ASSETS", "")
    outcomes = list(fuzz_media.run(COUNT, 1, 1, assets))
    assert [each.number for each in outcomes] == [*range(COUNT)]
    assert fuzz_media.summary(outcomes)["findings"] == []
    assert {"decoded", "refused"} == {each.kind for each in outcomes}
    assert all(each.reason for each in outcomes if each.kind == "refused")
    assert max(each.peak_mib for each in outcomes) < 1500


def test_a_file_follows_from_its_number_alone():
    first, again = (fuzz_media.damaged(5, 3, "") for _ in range(2))
    assert first == again != fuzz_media.damaged(5, 4, "")
