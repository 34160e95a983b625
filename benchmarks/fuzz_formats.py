"""Damage to files that are no JSON: archives of arrays, images and ONNX graphs."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz_mutations import NAMES, anything, dumps, some_bytes

SIDE = 8


def npy(descr: str, shape: str, body: bytes, *, fortran: str = "False") -> bytes:
    """An array as numpy writes it, whatever its header says."""
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    header += " " * (64 - (len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1") + body


def npz_file(rng: Random, path: Path, count: int = 4) -> str:
    """Write an archive of extra images with something wrong in it."""
    if rng.random() < 0.35:
        path.write_bytes(some_bytes(rng, path.read_bytes()))
        return "bytes of an archive"
    pixels, labels = bytes(count * SIDE * SIDE * 3), struct.pack(f"<{count}q", *range(count))
    shape = f"({count}, {SIDE}, {SIDE}, 3)"
    image, label = ("'|u1'", shape, pixels), ("'<i8'", f"({count},)", labels)
    kind = rng.randrange(7)
    if kind == 0:
        image = ("'|O'", shape, b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    elif kind == 1:
        wrong = (
            f"({2**60}, {SIDE}, {SIDE}, 3)",
            "(0, 8, 8, 3)",
            "(-1, 8, 8, 3)",
            "()",
            "(4,)",
            f"({2**40},) * 9",
            "'x'",
        )
        image = ("'|u1'", rng.choice(wrong), pixels)
    elif kind == 2:
        types = ("'<f8'", "'|S9999999999'", "[('a', '<i4')]", "'x'", "__import__('os')", "'<U8'", "None", "'|b1'")
        image = (rng.choice(types), shape, pixels)
    elif kind == 3:
        wrong = (b"", labels[:-1], struct.pack("<4q", 0, 1, 2, 2**62), struct.pack("<4q", 0, 1, -5, 2))
        label = ("'<i8'", f"({rng.choice((count, 2**50, 0))},)", rng.choice(wrong))
    elif kind == 4:  # a bomb: a thousand times as large unpacked
        image = ("'|u1'", f"({1 << 20}, {SIDE}, {SIDE}, 3)", bytes(1 << 20))
    packed = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr(rng.choice(("image.npy",) * 9 + ("../image.npy",)), npy(*image))
        archive.writestr("label.npy", npy(*label))
        if kind == 5:
            for name in (*NAMES[:4], "image.npy", "a.pkl"):
                archive.writestr(name or "empty", b"x")
    if kind == 6:  # sizes in the directory of the archive
        content = bytearray(path.read_bytes())
        at = content.rfind(b"PK\x01\x02")
        content[at + 20 : at + 28] = struct.pack("<II", *rng.choice(((0, 0), (2**31, 2**31), (5, 2**32 - 1))))
        path.write_bytes(bytes(content))
    return "an archive of arrays"


def png(width: int, height: int, rows: bytes) -> bytes:
    """An RGB image whose header may lie."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(owned) (w) file closefile\nshowpage\n"


def picture_file(rng: Random, path: Path) -> str:
    """Damage an image."""
    from PIL import Image

    kind = rng.randrange(8)
    if kind == 0:
        sides = rng.choice(((2**31 - 1, 2**31 - 1), (60_000, 60_000), (12_000, 12_000), (1, 60_000_000), (9000, 7000)))
        path.write_bytes(png(*sides, bytes(1000)))
        return "an image that claims to be huge"
    if kind == 1:
        sides = rng.choice(((8000, 8000), (1, 1_000_000), (1_000_000, 1)))
        path.write_bytes(png(*sides, bytes((3 * sides[0] + 1) * sides[1])))
        return "a decompression bomb"
    if kind == 2:
        path.write_bytes(
            rng.choice((POSTSCRIPT, b"GIF89a", b"\xff\xd8\xff\xe0", b"BM", b"", b"RIFF\x00\x00\x00\x00WEBPVP8 "))
        )
        return "another format"
    if kind < 6:
        buffer = io.BytesIO()
        picture = Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE))
        form = rng.choice(("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF"))
        mode = rng.choice(("RGB", "L", "1")) if form in ("PNG", "TIFF") else "RGB"
        picture.convert(mode).save(buffer, form)
        path.write_bytes(some_bytes(rng, buffer.getvalue()))
        return f"bytes of a {form}"
    path.write_bytes(some_bytes(rng, path.read_bytes()))
    return "bytes of an image"


def graph_file(rng: Random, path: Path) -> str:
    """Damage an ONNX file: its graph, its weights, where they are said to lie, what it says of itself."""
    import onnx

    if rng.random() < 0.3:
        path.write_bytes(some_bytes(rng, path.read_bytes()))
        return "bytes of an ONNX file"
    proto = onnx.load(str(path), load_external_data=False)
    said = _damaged(rng, proto)
    path.write_bytes(proto.SerializeToString())
    return said


def _damaged(rng: Random, proto: Any) -> str:
    graph, kind = proto.graph, rng.randrange(10)
    tensor, node = rng.choice(graph.initializer), rng.choice(graph.node)
    if kind == 0:
        tensor.dims[:] = rng.choice(([2**40], [2**31, 2**31, 2**31], [-1], [0], [], [2**62, 4]))
        return "shape of a weight"
    if kind == 1:
        tensor.data_type = rng.choice((0, 2, 7, 8, 10, 14, 99, 2**30))
        return "type of a weight"
    if kind == 2:
        return _moved(rng, tensor)
    if kind == 3:
        value = rng.choice([*graph.input, *graph.output])
        dim = rng.choice(value.type.tensor_type.shape.dim)
        dim.dim_value = rng.choice((0, -1, 1, 2**40, 2**62))
        return "shape of an input or output"
    if kind == 4:
        entry = rng.choice(proto.metadata_props)
        value = anything(rng)
        entry.value = dumps(value).encode("utf-8", "replace").decode() if rng.random() < 0.8 else "{"
        return f"metadata {entry.key}"
    if kind == 5:
        node.op_type = rng.choice(("", "Loop", "Nothing", "Reshape", "Expand", "Tile", "Relu", "A" * 10_000))
        return "kind of a node"
    if kind == 6:
        node.input[:] = rng.choice(([], ["missing"], [node.output[0]], list(node.input) * 50))
        return "inputs of a node"
    if kind == 7:
        del graph.node[:]
        return "no nodes"
    if kind == 8:
        proto.opset_import[0].version = rng.choice((0, -1, 1, 999, 2**40))
        proto.ir_version = rng.choice((0, 3, 999, proto.ir_version))
        return "versions"
    graph.output.add().CopyFrom(graph.input[0])
    return "another output"


def _moved(rng: Random, tensor: Any) -> str:
    import onnx

    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    location = rng.choice((*NAMES[:6], "missing.data", "model.onnx", "../model.onnx", "\x1b[2J"))
    pairs = {"location": location, "offset": str(rng.choice((0, -1, 2**62))), "length": str(rng.choice((8, 2**62, -1)))}
    for key, value in pairs.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return f"weights said to be in {location!r}"
