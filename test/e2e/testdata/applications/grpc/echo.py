"""A gRPC server of Google's own implementation. Messages are bytes as they are.

usage: echo.py PORT [BIND]

It says on standard output which calls were cancelled.
"""

import sys
import time
from concurrent import futures

import grpc


def unary(request, context):
    context.send_initial_metadata([m for m in context.invocation_metadata() if m[0].startswith("x-")])
    context.set_trailing_metadata([("x-last-bin", b"\x00\xff"), ("x-host", context._rpc_event.call_details.host)])
    return request


def fail(request, context):
    context.set_trailing_metadata([("x-why", "because")])
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no: 100 % größer")


def ticks(request, context):
    for _ in range(int(request)):
        yield repr(time.time()).encode()
        time.sleep(0.1)


def total(requests, context):
    return str(sum(len(r) for r in requests)).encode()


def talk(requests, context):
    for request in requests:
        yield request


def wait(request, context):
    left = context.time_remaining()
    context.add_callback(lambda: print("cancelled", request.decode(), flush=True))
    yield repr(left).encode()
    while context.is_active():
        time.sleep(0.02)


handlers = grpc.method_handlers_generic_handler(
    "test.Echo",
    {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Ticks": grpc.unary_stream_rpc_method_handler(ticks),
        "Total": grpc.stream_unary_rpc_method_handler(total),
        "Talk": grpc.stream_stream_rpc_method_handler(talk),
        "Wait": grpc.unary_stream_rpc_method_handler(wait),
    },
)
server = grpc.server(
    futures.ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", 64 << 20)]
)
server.add_generic_rpc_handlers((handlers,))
bind = sys.argv[2] if len(sys.argv) > 2 else "0.0.0.0"
server.add_insecure_port(f"{bind}:{sys.argv[1]}")
server.start()
print("listening", flush=True)
server.wait_for_termination()
