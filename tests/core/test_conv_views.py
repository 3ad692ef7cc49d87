"""What a convolution says, from ONNX and from aten, and what is none."""

import pytest

from qcompiler.conv_views import ConvView, as_conv
from qcompiler.reader import parse
from qcompiler.rewrite import Declined


def view_of(text: str, consts: str = "", dialect: str = "onnx", x: str = "f32[1, 6, 9, 9]") -> ConvView:
    graph = parse(
        f"""graph @main dialect={dialect} {{
          input %x: {x}
          const %w: f32[4, 3, 3, 2] = rand:1
          const %b: f32[4] = rand:2
          {consts}
          {text}
          return %y
        }}"""
    )
    assert graph.outputs[0].owner is not None
    return as_conv(graph.outputs[0].owner)


def test_defaults_and_attributes() -> None:
    view = view_of("%y: f32[1, 4, 7, 8] = onnx.Conv(%x, %w) {group = 2}")
    assert (view.group, view.kernel, view.strides, view.dilations) == (2, (3, 2), (1, 1), (1, 1))
    assert (view.pads, view.auto_pad, view.bias, view.shape) == ((0, 0, 0, 0), "NOTSET", None, (4, 18))
    full = "{group = 2, strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 3], kernel_shape = [3, 2]}"
    view = view_of(f"%y: f32[1, 4, 5, 7] = onnx.Conv(%x, %w, %b) {full}")
    assert (view.strides, view.pads, view.dilations) == ((2, 1), (1, 0, 2, 1), (1, 3))
    assert view.bias is not None and not view.depthwise
    assert view.attrs["pads"] == (1, 0, 2, 1) and view.attrs["kernel_shape"] == (3, 2)


def test_automatic_padding_has_no_numbers() -> None:
    view = view_of('%y: f32[1, 4, 9, 9] = onnx.Conv(%x, %w) {group = 2, auto_pad = "SAME_LOWER"}')
    assert view.auto_pad == "SAME_LOWER" and "pads" not in view.attrs


def test_depthwise() -> None:
    view = view_of("%y: f32[1, 6, 9, 9] = onnx.Conv(%x, %d) {group = 6}", "const %d: f32[6, 1, 1, 1] = rand:3")
    assert view.depthwise and view.shape == (6, 1)


@pytest.mark.parametrize(
    ("text", "pads", "strides", "auto"),
    [
        ("aten.conv2d.default(%x, %w, %b) {args = [$0, $1, $2, [2, 2], [1, 0], [1, 1], 2]}", (1, 0, 1, 0), 2, "NOTSET"),
        ("aten.conv2d.default(%x, %w) {args = [$0, $1, none, [2], [1], [1], 2]}", (1, 1, 1, 1), 2, "NOTSET"),
        ('aten.conv2d.padding(%x, %w) {args = [$0, $1, none, [1, 1], "same", [1, 1], 2]}', (0,) * 4, 1, "SAME_UPPER"),
        (
            "aten.convolution.default(%x, %w) {args = [$0, $1, none, [1, 1], [0, 0], [1, 1], false, [0, 0], 2]}",
            (0,) * 4,
            1,
            "NOTSET",
        ),
    ],
)
def test_aten(text: str, pads: tuple[int, ...], strides: int, auto: str) -> None:
    view = view_of(f"%y: f32[1, 4, 7, 8] = {text}", dialect="aten")
    assert (view.group, view.pads, view.strides, view.auto_pad) == (2, pads, (strides, strides), auto)
    assert view.shape == (4, 18)


NOT_ONE = [
    ("onnx.Conv(%x, %w) {group = 3}", "", "do not divide into 3 groups"),
    ("onnx.Conv(%x, %w) {group = 2, kernel_shape = [3, 3]}", "", "kernel_shape"),
    ("onnx.Conv(%x, %w, %c) {group = 2}", "const %c: f32[3] = rand:1", "has a bias"),
    ("onnx.ConvTranspose(%x, %w)", "", "transposed convolution"),
    ('com.microsoft.FusedConv(%x, %w) {activation = "Relu", group = 2}', "", "holds an activation"),
    ("onnx.Conv(%x, %x)", "", None),
    ("onnx.Conv(%x, %m)", "const %m: f32[4, 3] = rand:1", "a weight of shape [4, 3]"),
    ("onnx.Relu(%x)", "", None),
]


@pytest.mark.parametrize(("text", "consts", "reason"), NOT_ONE)
def test_what_is_none_says_why(text: str, consts: str, reason: str | None) -> None:
    with pytest.raises(Declined) as e:
        view_of(f"%y: f32[1, 4, 7, 8] = {text}", consts)
    assert e.value.quiet is (reason is None)
    assert (reason or "") in e.value.reason.message
