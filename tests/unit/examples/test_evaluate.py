"""Tables of the demo model, and the questions as a server gets them."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from examples.demo_model.answerers import AnswerError, ServerAnswerer
from examples.demo_model.evaluate import KindResult, format_mistakes, format_table, measure
from examples.demo_model.held_out import HeldOutQuestion, make_questions


class AlwaysRed:
    """Answers every question alike."""

    def answer(self, question: HeldOutQuestion) -> str:
        """Return the text of the greedy answer."""
        return "The shape is red."


@dataclass
class FakeServer:
    """What a fake OpenAI server got, and what it replies."""

    url: str = ""
    status: int = 200
    bodies: list[dict[str, object]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "demo"}]})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            fake.bodies.append(json.loads(self.rfile.read(length)))
            fake.keys.append(self.headers["Authorization"])
            self.reply(fake.status, {"choices": [{"message": {"content": " It is a star. "}}]})

        def reply(self, status: int, body: dict[str, object]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with HTTPServer(("127.0.0.1", 0), Handler) as http_server:
        fake.url = f"http://127.0.0.1:{http_server.server_port}/v1"
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        yield fake
        http_server.shutdown()
        thread.join()


def test_an_answer_is_right_only_letter_by_letter() -> None:
    questions = make_questions("colour", 6, seed=1)
    expected = sum(question.turn.answer == "The shape is red." for question in questions)
    result = measure(AlwaysRed(), ["colour"], num_per_kind=6, seed=1)[0]
    assert result.num_asked - len(result.mistakes) == expected


def test_the_table_marks_a_missed_target() -> None:
    mistake = ("What color is it?", "The shape is red.", "The shape is blue.")
    results = [KindResult("colour", 10, (mistake,)), KindResult("motion", 10, ())]
    table = format_table(results)
    assert "| colour | 10 | 90.0% | 97% missed |" in table
    assert "| motion | 10 | 100.0% |  |" in table
    assert "answered 'The shape is blue.'" in format_mistakes(results, most=1)


def test_a_question_is_sent_with_its_pictures_as_data_urls(server: FakeServer) -> None:
    question = make_questions("which_picture", 1, seed=3)[0]
    answer = ServerAnswerer(server.url, api_key="secret").answer(question)
    body = server.bodies[0]
    message = body["messages"]
    assert isinstance(message, list)
    parts = [part for part in message[0]["content"] if part["type"] == "image_url"]
    files = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in parts]
    assert answer == "It is a star."
    assert (body["model"], body["temperature"]) == ("demo", 0)
    assert files == [data for data, _ in question.files()]
    assert all(Image.open(io.BytesIO(data)).size for data in files)
    assert server.keys == ["Bearer secret"]


def test_a_question_without_pictures_is_a_plain_string(server: FakeServer) -> None:
    question = make_questions("small_talk", 1, seed=3)[0]
    ServerAnswerer(server.url).answer(question)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": question.turn.question}]


def test_an_error_of_the_server_is_told(server: FakeServer) -> None:
    answerer = ServerAnswerer(server.url)
    server.status = 503
    with pytest.raises(AnswerError, match="503"):
        answerer.answer(make_questions("small_talk", 1, seed=3)[0])


def test_an_address_without_a_host_is_refused() -> None:
    with pytest.raises(ValueError, match="not an address"):
        ServerAnswerer("nowhere")
