from __future__ import annotations

from pathlib import Path

import pytest

from afina.site.gpus import driver_version, fits_driver, mig_slices, minimum_driver, visible

MIG = "MIG-8f3a5f2e-1b1c-5d5e-9a57-0a1b2c3d4e5f"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0,1", ("0", "1")),
        (" 3 , 5 ", ("3", "5")),
        ("", ()),
        ("NoDevFiles", ()),
        ("0,-1,1", ("0",)),
        ("0,,1", ("0",)),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",)),
        (f"{MIG},MIG-GPU-x/1/0", (MIG, "MIG-GPU-x/1/0")),
    ],
)
def test_devices_are_read_as_cuda_reads_them(value: str, expected: tuple[str, ...]) -> None:
    assert visible({"CUDA_VISIBLE_DEVICES": value}) == expected
    assert mig_slices({"CUDA_VISIBLE_DEVICES": value}) == tuple(d for d in expected if d.startswith("MIG"))


def test_no_variable_is_not_no_device() -> None:
    assert visible({}) is None and mig_slices({}) == ()


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@b)\nGCC 12.2.0",
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  Tue\n", "550.54"),
        ("nothing of the kind\n", None),
    ],
)
def test_the_driver_is_read_from_its_file(tmp_path: Path, line: str, version: str | None) -> None:
    (tmp_path / "version").write_text(line)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "none") is None


def test_which_driver_a_cuda_needs() -> None:
    assert [minimum_driver(c) for c in ("12.6", "13.0", "11.8", "9.2", None, "", "?")] == [
        "525.60.13",
        "580.65.06",
        "450.80.02",
        *[None] * 4,
    ]
    assert fits_driver("535.104.05", "525.60.13") and fits_driver("525.60.13", "525.60.13")
    assert not fits_driver("525.60.9", "525.60.13") and not fits_driver("99.1", "450.80.02")
