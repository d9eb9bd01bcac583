"""An ONNX model with its weights in fewer bits, by ONNX Runtime's own quantizers; no kernel and no packing is ours.

Where a segment runs on one token after the other, reading its weights is what takes time: ``MatMulNBits`` holds them in
blocks of 4 or 8 bits. Where it runs on many at once, products do: dynamic int8 multiplies integers. Biases, norms and
convolutions stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from offramp.export.rounding import Rounding

#: Weights that share a scale, by bits: one for 32 of 4 bits would be a fifth of the bytes, and of a token's time.
_BLOCK = {4: 128, 8: 64}
_ROW_BLOCKS = {4: (32, 16), 8: (64, 32, 16)}  # of tables: the first that divides a row
_MICROSOFT = "com.microsoft"
_LEAST = 1024  # bytes: smaller arrays stay as they are
#: How the names of nodes begin whose products have 8 bits in fp32 and fp16 too, with bounds that have to hold.
SCREENING = "screen"
#: Tables, weights of which rows are gathered, by name: what rounds one, turned round, to 4 bits; None for one of 8.
Tables = Mapping[str, Callable[[NDArray[np.float32], int], NDArray[np.float32]] | None]
#: Operators that take a part of a weight: of ``nn.MultiheadAttention``, which has three in one, or of stacked experts.
PARTS = ("Split", "Slice", "Gather")


def quantized(
    model: onnx.ModelProto, encoding: str, tables: Tables, rounding: Rounding | None = None
) -> onnx.ModelProto:
    """The model in one of the manifest's `ENCODINGS`, which may be made of the very model that is given.

    Args:
        model: with its weights inside.
        encoding: of its products.
        tables: of which rows are gathered, here or in another file (see `gathered`). Products with them have their
            bits in any encoding: a head that is tied to the words' table reads the same bytes.
        rounding: of weights of 4 bits; None takes the nearest of steps that reach to a block's greatest weight.
    """
    if encoding == "fp32":
        return model
    if encoding == "fp16":
        return _halves(model)
    with _quiet():
        model = _folded(_tables(_products(_folded(model, PARTS)), tables), (*PARTS, "Transpose"))
        if encoding == "int8-dynamic":
            return _dynamic(model)
        if encoding == "int4" and rounding is not None:
            _round(model, rounding)
        return _blocks(model, 4 if encoding == "int4" else 8)


def encoding_of(model: onnx.ModelProto) -> str:
    """What a model's weights are: where `quantized` found nothing of a kind, another than it was asked for."""
    own = [node for node in model.graph.node if not _of_screening(node)]
    kinds = {node.op_type for node in own}
    if "MatMulInteger" in kinds:
        return "int8-dynamic"
    if kinds.isdisjoint(("MatMulNBits", "GatherBlockQuantized")):
        halves = any(item.data_type == onnx.TensorProto.FLOAT16 for item in model.graph.initializer)
        return "fp16" if halves else "fp32"
    bits = {item.i for node in own for item in node.attribute if item.name == "bits"}
    return "int4" if 4 in bits else "int8"


def _of_screening(node: onnx.NodeProto) -> bool:
    return bool(node.name.startswith(SCREENING))


def gathered(model: onnx.ModelProto) -> set[str]:
    """The weights of which a model gathers rows: tables that `quantized` can encode."""
    tables = {item.name: item for item in model.graph.initializer}
    return {
        node.input[0]
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.input[0] in tables
        and _is_table(node, tables[node.input[0]])
        and not _of_screening(node)
    }


def turned(model: onnx.ModelProto) -> dict[str, str]:
    """What the products read whose weights are tables turned round, by the tables' names."""
    made = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in made]
    return {made[node.input[1]]: node.input[0] for node in products if not _of_screening(node)}


def _is_table(node: onnx.NodeProto, weight: onnx.TensorProto) -> bool:
    wide = len(weight.dims) == 2 and 4 * weight.dims[0] * weight.dims[1] >= _LEAST and weight.dims[1] % 16 == 0
    return wide and weight.data_type == onnx.TensorProto.FLOAT and not any(item.i for item in node.attribute)


def _halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of half the bytes: ONNX Runtime makes them whole at load, and rows of tables once they are gathered."""
    graph = model.graph
    returned = {item.name for item in graph.output}  # of which a weight may be one
    weights = {item.name: item for item in graph.initializer if item.name not in returned}
    halves = dict[str, str]()
    rough = [node for node in graph.node if _of_screening(node) and node.op_type in ("MatMul", "MatMulNBits")]
    bounds = {name for node in rough for name in node.input}
    for item in [item for item in weights.values() if item.name not in bounds]:
        if item.data_type == onnx.TensorProto.FLOAT and 4 * np.prod(item.dims) >= _LEAST:
            array = numpy_helper.to_array(item)
            if np.abs(array).max() <= np.finfo(np.float16).max:
                halves[item.name] = f"{item.name}_half"
                graph.initializer.append(numpy_helper.from_array(array.astype(np.float16), halves[item.name]))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in halves:
            (out,) = node.output
            rest = onnx.NodeProto()
            rest.CopyFrom(node)
            rest.input[0], rest.output[0] = halves[node.input[0]], f"{out}_half"
            nodes += [rest, helper.make_node("Cast", [f"{out}_half"], [out], to=onnx.TensorProto.FLOAT)]
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input} & halves.keys()
    whole = [helper.make_node("Cast", [halves[name]], [name], to=onnx.TensorProto.FLOAT) for name in sorted(read)]
    for name in halves:
        graph.initializer.remove(weights[name])
    return _with_nodes(model, [*whole, *nodes])


def _with_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """The model with these nodes, some of which are its own."""
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with products and sums in the place of ``Gemm`` of a weight, which no quantizer for blocks knows."""
    weights = {item.name for item in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        how = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        plain = not how.get("transA") and how.get("alpha", 1.0) == how.get("beta", 1.0) == 1.0
        if node.op_type != "Gemm" or node.input[1] not in weights or not plain:
            nodes.append(node)
            continue
        (data, weight, *bias), (out,) = node.input, node.output
        if how.get("transB"):
            nodes.append(helper.make_node("Transpose", [weight], [f"{out}_weight"], perm=[1, 0]))
            weight = f"{out}_weight"
        nodes.append(helper.make_node("MatMul", [data, weight], [f"{out}_product" if any(bias) else out]))
        if any(bias):
            nodes.append(helper.make_node("Add", [f"{out}_product", *bias], [out]))
    return _with_nodes(model, nodes)


def _tables(model: onnx.ModelProto, tables: Tables) -> onnx.ModelProto:
    """Tables in blocks of 8 or 4 bits: rows are gathered, and products with one turned round read the same array."""
    graph = model.graph
    weights = {item.name: item for item in graph.initializer if item.name in tables}
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    for at, node in enumerate(list(graph.node)):
        products = node.op_type == "MatMul" and turned.get(node.input[1]) in weights
        if products:
            name = turned[node.input[1]]
        elif node.op_type == "Gather" and node.input[0] in weights and _is_table(node, weights[node.input[0]]):
            name = node.input[0]
        else:
            continue
        rows, width = weights[name].dims
        rounding = tables[name]
        bits = 8 if rounding is None else 4
        block = _block_of(width, bits)
        if f"{name}_blocks" not in weights:
            table = numpy_helper.to_array(weights[name])
            packed, scales = packed_rows(table if rounding is None else rounding(table.T, block).T, bits)
            for kind, array in (("blocks", packed), ("rows", packed.reshape(rows, -1)), ("scales", scales)):
                weights[f"{name}_{kind}"] = numpy_helper.from_array(array, f"{name}_{kind}")
                graph.initializer.append(weights[f"{name}_{kind}"])
        if products:
            made = helper.make_node(
                "MatMulNBits",
                [node.input[0], f"{name}_blocks", f"{name}_scales"],
                node.output,
                domain=_MICROSOFT,
                K=width,
                N=rows,
                bits=bits,
                block_size=block,
                accuracy_level=4,
            )
        else:
            made = helper.make_node(
                "GatherBlockQuantized",
                [f"{name}_rows", node.input[1], f"{name}_scales"],
                node.output,
                domain=_MICROSOFT,
                bits=bits,
                block_size=block,
                gather_axis=0,
                quantize_axis=1,
            )
        graph.node[at].CopyFrom(made)
    if not any(item.domain == _MICROSOFT for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    return _without_unread(model)


def _block_of(width: int, bits: int) -> int:
    """How many weights of a table's row share a scale; the width is a multiple of 16."""
    return next(size for size in _ROW_BLOCKS[bits] if width % size == 0)


def packed_rows(table: NDArray[np.float32], bits: int = 8) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A table as ``MatMulNBits`` reads it: uint8 [rows, blocks, bytes of a block], and scales float32 [rows, blocks].

    Its ``width`` is a multiple of 16; a weight of 8 bits is its byte less 128, times its block's scale.
    """
    with _quiet():
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

        config = quantizer.DefaultWeightOnlyQuantConfig(_block_of(table.shape[1], bits), is_symmetric=True, bits=bits)
        made = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(table.T))
    return made[0], made[1]


def _round(model: onnx.ModelProto, rounding: Rounding) -> None:
    """Round the weights that products alone read."""
    returned = {item.name for item in model.graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {
        item.name: [] for item in model.graph.initializer if item.name not in returned
    }
    for node in model.graph.node:
        for name in set(node.input) & readers.keys():
            readers[name].append(node)
    for item in [item for item in model.graph.initializer if item.name in readers]:
        products = [node for node in readers[item.name] if node.op_type == "MatMul" and node.input[1] == item.name]
        if len(item.dims) == 2 and products and len(products) == len(readers[item.name]):
            weight = rounding(products[0].input[0], numpy_helper.to_array(item), _BLOCK[4])
            item.CopyFrom(numpy_helper.from_array(weight, item.name))


def _blocks(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """Weights of so many bits, a scale for each block of them; activations of products are rounded to 8 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=_BLOCK[bits], is_symmetric=True, accuracy_level=4, op_types_to_quantize=("MatMul",), bits=bits
    )
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made


def _dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """Products of whole numbers: weights of 8 bits, a scale for each column; activations by their own range."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantize_dynamic(
            model,
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return _apart(onnx.load(file))


def _apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with names of their own for the weights and zero points of each product; a bundle has one copy.

    ONNX Runtime does not open a session with sums that do not overflow where two products read one of them.
    """
    graph = model.graph
    weights, read = {item.name: item for item in graph.initializer}, set[str]()
    for node in [node for node in graph.node if node.op_type == "MatMulInteger"]:
        for at in [at for at, name in enumerate(node.input) if name in weights]:
            if (name := node.input[at]) in read:
                node.input[at] = f"{node.output[0]}_{at}"
                copy = onnx.TensorProto.FromString(weights[name].SerializeToString())
                copy.name = node.input[at]
                graph.initializer.append(copy)
            read.add(node.input[at])
    return model


def _folded(model: onnx.ModelProto, kinds: Collection[str]) -> onnx.ModelProto:
    """The model with what these operators make of weights as weights: a quantizer sees none behind an operator."""
    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    made = {item.name for item in graph.output}
    for node in list(graph.node):
        known = node.op_type in kinds and all(name in weights for name in node.input)
        rows = known and node.op_type == "Gather" and len(weights[node.input[1]].dims) > 0  # of a table
        if not known or rows or not made.isdisjoint(node.output):
            continue
        arrays = {name: numpy_helper.to_array(weights[name]) for name in node.input}
        for name, array in zip(node.output, ReferenceEvaluator(node).run(None, arrays), strict=True):
            weights[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
            graph.initializer.append(weights[name])
        graph.node.remove(node)
    return _without_unread(model)


def _without_unread(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without weights, and transpositions of some, that nothing reads."""
    graph = model.graph
    read = {name for node in graph.node for name in node.input} | {item.name for item in graph.output}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.output[0] not in read]:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input} | {item.name for item in graph.output}
    for item in [item for item in graph.initializer if item.name not in read]:
        graph.initializer.remove(item)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the root logger as it is: the quantizers set it, and tell of each node."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
