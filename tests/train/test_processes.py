"""Several processes, as torchrun starts them, here on the CPU: they train and evaluate as one would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posmlp.cli import main

ROOT = Path(__file__).resolve().parents[2]
load_file = pytest.importorskip("safetensors.torch", reason="needs the train extra").load_file
PLAIN = (
    "--drop", "0", "--drop-path", "0", "--mixup", "0", "--cutmix", "0", "--precision", "float32",
    "--threads", "1", "--epochs", "2", "--ema", "0.9", "--lr", "1e-3", "--lr-batch", "8", "--workers", "0",
)  # fmt: skip


def torchrun(module: str, *arguments: str) -> str:
    """The output of two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("model", "windows"), [("posmlp_nano", ("4", "2")), ("posmlp_nano_sgu", ("4", "2"))], ids=["gqpe", "sgu"]
)
def test_two_processes_train_as_one_with_the_doubled_batch(images, tmp_path, model, windows):
    common = ["train", str(images), "--model", model, "--img-size", "16", "--windows", *windows, *PLAIN]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main([*common, "--batch-size", "8", "--accumulate", "1", "--out", one]) == 0
    shown = torchrun("posmlp", *common, "--batch-size", "4", "--out", two)
    assert shown.count("epoch 2:") == 1, "only the first process speaks"
    assert "8 images (4 x 1 x 2 processes)" in shown
    start = load_file(Path(one) / "initial.safetensors")
    for name in ("last", "ema"):
        alone, together = (load_file(Path(out) / f"{name}.safetensors") for out in (one, two))
        for key, value in alone.items():
            if key.startswith("stem.conv") and key.endswith("bias"):
                continue  # batch norm takes it out again: its gradient is nothing but rounding
            moved = (value.double() - start[key].double()).norm()
            apart = (value.double() - together[key].double()).norm()
            assert apart <= 2e-3 * moved + 1e-6, f"{name} {key}: {apart:.2g} apart after a way of {moved:.2g}"
    rows = [(Path(out) / "log.csv").read_text().splitlines()[-1].split(",") for out in (one, two)]
    assert float(rows[0][2]) == pytest.approx(float(rows[1][2]), rel=1e-4)


def test_two_processes_evaluate_every_image_once(images, tmp_path):
    """14 images, two of them broken, in batches of 4: no padding that would count twice, none lost."""
    data, out = tmp_path / "images", str(tmp_path / "run")
    shutil.copytree(images, data)
    (data / "val" / "light" / "01.png").write_bytes(b"no image")  # the ninth, of the first process
    (data / "val" / "light" / "02.png").write_bytes(b"no image")  # of the second
    small = ["--model", "posmlp_nano", "--img-size", "16", "--windows", "4", "2"]
    assert main(["train", str(data), *small, *PLAIN, "--batch-size", "8", "--out", out]) == 0
    command = ["eval", str(data), "--weights", str(Path(out) / "best.safetensors"), "--batch-size", "4"]
    alone = subprocess.run(
        [sys.executable, "-m", "posmlp", *command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    together = torchrun("posmlp", *command)
    scores = [re.search(r"^12 images, .*$", text, re.M) for text in (alone, together)]
    assert scores[0] and scores[1] and scores[0].group() == scores[1].group()
    assert "2 skipped" in alone and "2 skipped" in together


def test_synchronised_batch_norm_is_batch_norm_of_all_images(tmp_path):
    """Outputs, gradients and running statistics of two processes against one with all images."""
    script = tmp_path / "norms.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "from posmlp.train.sync_norm import synchronize_norms\n"
        "dist.init_process_group('gloo')\n"
        "rank = dist.get_rank()\n"
        "torch.manual_seed(0)\n"
        "x, dy = torch.randn(2, 6, 3, 5, 4, dtype=torch.float64).unbind()\n"
        "norm = torch.nn.BatchNorm2d(3, dtype=torch.float64)\n"
        "torch.nn.init.normal_(norm.weight)\n"
        "whole = torch.nn.BatchNorm2d(3, dtype=torch.float64)\n"
        "whole.load_state_dict(norm.state_dict())\n"
        "synchronize_norms(torch.nn.Sequential(norm), torch.device('cpu'))\n"
        "mine = slice(3 * rank, 3 * rank + 3)\n"
        "part = x[mine].clone().requires_grad_()\n"
        "y = norm(part); y.backward(dy[mine])\n"
        "all_ = x.clone().requires_grad_()\n"
        "z = whole(all_); z.backward(dy)\n"
        "close = torch.testing.assert_close\n"
        "close(y, z[mine]); close(part.grad, all_.grad[mine])\n"
        "dist.all_reduce(norm.weight.grad); close(norm.weight.grad, whole.weight.grad)\n"
        "close(norm.state_dict(), whole.state_dict())\n"
        "norm.eval(); whole.eval(); close(norm(part), whole(part))\n"
        "print('same', flush=True); dist.destroy_process_group()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.stdout.count("same") == 2, done.stdout + done.stderr
    assert not torch.distributed.is_initialized()
