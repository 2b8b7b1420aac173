"""Ask one question about pictures over gRPC and print the answer as it is generated.

Usage::

    python examples/grpc_client.py --address 127.0.0.1:8001 PICTURE... "QUESTION"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc

from chiasm.v1 import chat_pb2, chat_pb2_grpc, generator_pb2, media_pb2

DEADLINE_S = 60.0


def main() -> None:
    """Parse the command line, send the request, print the stream."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="127.0.0.1:8001")
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("question")
    arguments = parser.parse_args()
    pictures = [path.read_bytes() for path in arguments.pictures]
    with grpc.insecure_channel(arguments.address) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        request = build_request(arguments.question, pictures)
        for response in stub.StreamChatCompletion(request, timeout=DEADLINE_S):
            sys.stdout.write(response.text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def build_request(question: str, pictures: list[bytes]) -> chat_pb2.StreamChatCompletionRequest:
    """Return the request that asks ``question`` about ``pictures`` (the files' bytes)."""
    parts = [
        chat_pb2.ContentPart(
            media=chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, data=picture)
        )
        for picture in pictures
    ]
    parts.append(chat_pb2.ContentPart(text=question))
    return chat_pb2.StreamChatCompletionRequest(
        request=chat_pb2.ChatCompletionRequest(
            messages=[chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=parts)],
            sampling=generator_pb2.SamplingParams(temperature=0.0),
        )
    )


if __name__ == "__main__":
    main()
