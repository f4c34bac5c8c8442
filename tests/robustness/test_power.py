"""Power cuts inside of a drop: what was removed by then is replaced by what the disk holds.

The cache lies on a file system in a file. After every step that publishes, removes or makes durable
the file is copied; each copy is mounted at the same place, and one run of the drop completes the
model from it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.images import LINUX_ROOT
from tests.robustness import cuts as shapes
from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.disk import (
    COPY,
    EXT4,
    Cut,
    cuts_of_a_drop,
    grow,
    image_options,
    memory,
    mounted,
    new_image,
)
from tests.robustness.harness import Model, completes, scratch, undisturbed

pytestmark = LINUX_ROOT
PLACES = ("one disk", "the model on another disk", "in place")


def disk_model(place: Path, disk: Path, cut: str, where: str) -> Model:
    """A model of which the cache or all lies on the disk."""
    outside = where == "the model on another disk"
    directory = write_tiny((place if outside else disk) / "model", CUTS[cut])
    return Model(directory, None if where == "in place" else disk / "cache")


def cut_off(place: Path, cut: str, where: str, options: str, chosen, **more) -> tuple[int, list]:
    """How many cuts there were, and what was wrong after each of the `chosen` ones."""
    image, disk, wrong = new_image(place / "image"), place / "disk", []
    outside = where == "the model on another disk"
    with mounted(disk, *image_options(image, options)):
        model = disk_model(place, disk, cut, where)
        right = undisturbed(model)
        os.sync()
        code, taken = cuts_of_a_drop(model, image, place / "cuts", outside, **more)
        assert code == 0
    taken = chosen(taken)
    for one in taken:
        with mounted(disk, *image_options(one.repair(), options)):
            one.restore(model)
            if not (verdict := completes(model, right)):
                call = one.call.replace(str(place), "")
                wrong.append(f"cut {one.place.name}, after {call}: {verdict.why}")
        shutil.rmtree(one.place)
    return len(taken), wrong


def around_removals(taken: list[Cut]) -> list[Cut]:
    """The cuts after the removal of a shard, and the one before the first."""
    gone = [i for i, cut in enumerate(taken) if _removes(cut)]
    return [taken[i] for i in sorted({gone[0] - 1, *gone})] if gone else []


def _removes(cut: Cut) -> bool:
    call, path, *_ = cut.call.split(" ")
    return call in ("unlink", "remove", "rename", "replace") and "/model/model-" in path


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("the model on another disk", EXT4[1]),
        pytest.param("in place", EXT4[0], marks=pytest.mark.long),
    ],
)
def test_after_a_power_cut_at_a_removal_the_next_run_completes(place, where, options):
    count, wrong = cut_off(place, "a cycle", where, options, around_removals)
    assert count >= 3
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", EXT4)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("cut", ["between linears", "a cycle", "a chain", "by size"])
def test_after_a_power_cut_at_any_step_the_next_run_completes(place, cut, where, options):
    count, wrong = cut_off(place, cut, where, options, list)
    assert count > 30
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


@pytest.mark.long
def test_without_fsync_a_power_cut_loses_the_model(place):
    """That these tests can fail: no fsync does anything, and each removal waits for the commit."""
    slow = "time.sleep(1.3)\n" + COPY.partition("import shutil, time")[2]
    script = "import shutil, time\nif '/model/model-' in event.paths[0]:\n    " + "\n    ".join(
        slow.format(cuts=str(place / "cuts"), image=str(place / "image"), outside="").splitlines()
    )
    more = {"no_fsync": True, "script": script}
    count, wrong = cut_off(place, "between linears", "one disk", EXT4[1], list, **more)
    assert count >= 3
    assert wrong


def test_a_drop_on_a_full_disk_ends_with_a_message_and_resumes():
    ended, wrong = full_disks("a chain", "cache", (100, 160))
    assert 1 in ended
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["cache", "in place"])
@pytest.mark.parametrize("cut", list(shapes.CUTS))
def test_a_drop_on_a_disk_of_any_size_resumes_with_space(cut, where):
    ended, wrong = full_disks(cut, where, range(4, 400, 4))
    assert {0, 1} <= set(ended)
    assert not wrong, f"{len(wrong)} of {len(ended)}:\n" + "\n".join(wrong)


def full_disks(cut: str, where: str, kibibytes) -> tuple[list[int], list[str]]:
    """Exit codes of drops with this free space beside the model, and what was wrong with each."""
    codes, wrong = [], []
    with scratch() as place:
        right = undisturbed(Model(write_tiny(place / "model", CUTS[cut]), None))
        size = sum(path.stat().st_size for path in (place / "model").iterdir()) >> 10
        for free in kibibytes:
            held = size + 64 if where == "in place" else 0
            with memory(place / "disk", f"{held + free}k") as disk:
                if where == "in place":
                    model = Model(write_tiny(disk / "model", CUTS[cut]), None)
                else:
                    directory = write_tiny(place / f"model {free}", CUTS[cut])
                    model = Model(directory, disk / "cache")
                ended = model.drop()
                codes.append(ended.code)
                if ended.code not in (0, 1) or "Traceback" in ended.err:
                    wrong.append(f"{free} KiB: ended badly: {ended.message}")
                grow(disk, "16m")
                if not (verdict := completes(model, right)):
                    wrong.append(f"{free} KiB: {verdict.why}")
    return codes, wrong
