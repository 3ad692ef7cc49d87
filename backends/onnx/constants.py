"""What a ``Constant`` node holds, as a payload."""

from __future__ import annotations

import numpy as np
import onnx

from qcompiler.backends.onnx.attributes import attr_of, items
from qcompiler.backends.onnx.tensors import Origin, payload_of
from qcompiler.backends.onnx.typemap import DEFAULT_DOMAINS
from qcompiler.dtypes import STRING
from qcompiler.payload import ArrayPayload, Payload, constant


def constant_of(node: onnx.NodeProto, origin: Origin, where: str) -> Payload | None:
    """The tensor of a ``Constant`` node; None for another node, and for a constant that is sparse or has no name."""
    if node.op_type != "Constant" or node.domain not in DEFAULT_DOMAINS:
        return None
    if len(node.attribute) != 1 or len(node.output) != 1 or not node.output[0]:
        return None
    attribute = node.attribute[0]
    if attribute.ref_attr_name:
        return None
    match attribute.name:
        case "value":
            return payload_of(attribute.t, origin, node.output[0])
        case "value_float":
            return constant(np.float32(attribute.f))
        case "value_floats":
            return constant(np.array(attribute.floats, np.float32))
        case "value_int":
            return constant(np.int64(attribute.i))
        case "value_ints":
            return constant(np.array(attribute.ints, np.int64))
        case "value_string" | "value_strings":
            found = items(attr_of(attribute, origin, where))
            array = np.empty(len(found), object)
            array[:] = found
            return ArrayPayload(array if attribute.name == "value_strings" else array.reshape(()), STRING)
    return None
