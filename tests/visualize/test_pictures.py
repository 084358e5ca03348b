"""`posmlp visualize`: every figure holds something, the page needs nothing else, mistakes take one line."""

from __future__ import annotations

import base64
import io
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib, of the demo extra")
image_module = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra")

from posmlp import create_model, save_checkpoint  # noqa: E402
from posmlp.card import ModelCard  # noqa: E402
from posmlp.cli import main  # noqa: E402
from posmlp.data import write_image  # noqa: E402
from posmlp.visualize.page import Plate, write_page  # noqa: E402

MODELS = {
    "posmlp_nano": {"shift": True},
    "posmlp_nano_gqpe_isotropic": {"bias": False},
    "posmlp_nano_lrpe": {"windows": (5, 3)},  # windows that stick out of the maps
    "posmlp_nano_glrpe": {},
    "posmlp_nano_lrpe_m": {},
    "posmlp_nano_sgu": {},
    "gmlp_s16_ggqpe": {"dims": (32,), "depths": 1, "windows": 2, "groups": 16},
}


def write_weights(folder: Path, name: str, seed: int = 0, **options) -> str:
    torch.manual_seed(seed)
    in_chans = 3 if name.startswith("gmlp") else 1
    options = {"in_chans": in_chans, **options}
    path = folder / f"{name}_{seed}.safetensors"
    save_checkpoint(create_model(name, **options), path)
    ModelCard(name, options=options, in_chans=in_chans, side=32).save(path)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return write_weights(tmp_path_factory.mktemp("weights"), "posmlp_nano")


@pytest.fixture(scope="module")
def digit(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("images") / "a <b> & $c$.png"
    write_image(path, torch.rand(1, 40, 32))
    return str(path)


class Page(HTMLParser):
    """What a page refers to and embeds; checks that its tags close in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.alts, self.links, self.open, self.tags, self.text = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs.pop("src"))
            self.alts.append(attrs["alt"])
        self.links += [value for name, value in attrs.items() if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_self_contained(path: Path, count: int) -> Page:
    """The page has `count` embedded images, and asks for no other file."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert not {"script", "link", "iframe"} & set(page.tags) and not page.links
    assert len(page.images) == count == page.tags.count("figcaption") and all(page.alts)
    for source in page.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        image_module.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()
    return page


def assert_drawn(path: Path) -> None:
    """More than a blank sheet, and nothing cut at its edges."""
    picture = image_module.open(path).convert("L")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*reversed(picture.size))
    assert (pixels < 200).float().mean() > 0.005 and len(pixels.unique()) > 30, path.name
    border = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all(), f"{path.name} runs over its edge"


@pytest.mark.parametrize("name", MODELS)
def test_every_encoding_is_drawn(name, tmp_path, capsys):
    path = write_weights(tmp_path, name, **MODELS[name])
    out = tmp_path / "out"
    assert main(["visualize", "--weights", path, "--out", str(out), "--device", "cpu"]) == 0
    levels = 1 if name.startswith("gmlp") else 2
    kinds = ["patterns", "extent"] + ["bias"] * (name != "posmlp_nano_gqpe_isotropic")
    kinds += [f"groups_level{i}" for i in range(levels) if name != "posmlp_nano_sgu"]
    kinds += [f"queries_level{i}" for i in range(levels) if name.endswith(("sgu", "lrpe_m"))]
    figures = sorted(out.glob("*.png"))
    assert [figure.stem for figure in figures] == sorted(kinds)
    for figure in figures:
        assert_drawn(figure)
    page = assert_self_contained(out / "index.html", len(kinds))
    assert name in page.text and "parameters" in page.text
    assert str(out / "index.html") in capsys.readouterr().out


def test_all_options(weights, digit, tmp_path):
    before = write_weights(tmp_path, "posmlp_nano", seed=1)
    given = ["--weights", weights, "--before", before, "--levels", "1", "--groups", "11", "--query", "0", "3"]
    assert main(["visualize", *given, "--image", digit, digit, "--out", str(tmp_path)]) == 0
    figures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert figures == sorted(
        ["bias.png", "effect_1.png", "effect_2.png", "extent.png", "groups_level1.png", "patterns.png"]
    )
    for figure in figures:
        assert_drawn(tmp_path / figure)
    page = assert_self_contained(tmp_path / "index.html", 6)
    assert "a <b> & $c$.png" in page.text and "0.16 M" in page.text
    assert "token 0, 3" in page.text and before in page.text


def test_the_same_weights_give_the_same_figures(weights, tmp_path):
    for name in "ab":
        assert main(["visualize", "--weights", weights, "--levels", "0", "--out", str(tmp_path / name)]) == 0
    for path in (tmp_path / "a").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_names_are_escaped(tmp_path):
    """Whatever a file is called, it is text on the page."""
    figure = tmp_path / "figure.png"
    write_image(figure, torch.rand(1, 4, 4))
    nasty = "<script>alert('x')</script> \" & \udcff"
    plate = Plate(figure, nasty, nasty, nasty)
    write_page(tmp_path / "page.html", nasty, nasty, [(nasty, nasty)], [plate])
    page = assert_self_contained(tmp_path / "page.html", 1)
    assert page.text.count("<script>alert('x')</script> \" & ?") == 7  # as the title, twice
    assert page.alts == ["<script>alert('x')</script> \" & ?"]


def test_images_keep_their_size_on_the_page(weights, tmp_path):
    assert main(["visualize", "--weights", weights, "--levels", "0", "--out", str(tmp_path)]) == 0
    width, height = struct.unpack(">II", (tmp_path / "patterns.png").read_bytes()[16:24])
    text = (tmp_path / "index.html").read_text()
    assert f'width="{width * 96 // 160}" height="{height * 96 // 160}"' in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--levels", "2"], "levels must be some of 0 to 1, got [2]"),
        (["--levels", "-1"], "--levels"),
        (["--groups", "0"], "--groups"),
        (["--query", "4", "0"], "4x4 windows of level 1, counted from 0, got 4 0"),
        (["--query", "8", "0", "--levels", "0"], "8x8 windows of level 0"),
        (["--query", "1"], "--query"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--before", "nowhere.pth"], "nowhere.pth"),
        (["--model", "posmlp_tiny"], "holds another model"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(arguments, named, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert named in one_line_error(capsys, ["--weights", weights, "--out", str(out), *arguments])
    assert not out.exists()


def test_mistakes_in_files(weights, digit, tmp_path, capsys):
    assert "--weights" in one_line_error(capsys, [])
    assert "nowhere" in one_line_error(capsys, ["--weights", "nowhere.safetensors"])
    other = write_weights(tmp_path, "posmlp_nano_sgu")
    error = one_line_error(capsys, ["--weights", weights, "--before", other])
    assert "posmlp_nano_sgu" in error and "holds another model" in error
    assert "out.png" in one_line_error(capsys, ["--weights", weights, "--out", taken(tmp_path / "out.png")])
    colour = write_weights(tmp_path, "posmlp_nano", seed=2, in_chans=3)  # a card that says grey
    assert "x must be [B, 3, H, W]" in one_line_error(capsys, ["--weights", colour, "--image", digit])


def taken(path: Path) -> str:
    path.write_text("a file")
    return str(path)


def one_line_error(capsys, arguments: list[str]) -> str:
    try:
        status = main(["visualize", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("posmlp: error: ") and error.count("\n") == 1, error
    return error
