"""An OpenAI-compatible endpoint on loopback that answers, refuses, or talks nonsense, as people report of real ones.

server = serve("good"): server.mode may change while it runs, and server.seen holds the requests.
"""
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What is refused with a status: {mode: (status, message)}.
ERRORS = {
    "context": (400, "This model's maximum context length is 8192 tokens."),
    "stream_only": (400, "This model only supports stream mode."),
    "key": (401, "Incorrect API key provided: sk-not-to***"),
    "no_model": (404, "The model `m` does not exist."),
    "quota": (429, "You exceeded your current quota."),
    "overloaded": (503, "No worker is ready."),
}
# What is refused where a request holds too much: {mode: (message, whether it does)}.
LIMITS = {
    "no_temperature": ("temperature is not supported with this model.",
                       lambda body, pictures: "temperature" in body),
    "temperature": ("'temperature' does not support this value.",
                    lambda body, pictures: body.get("temperature", 1) != 1),
    "images": ("At most 1 image(s) may be provided.", lambda body, pictures: pictures > 1),
    "text_only": ("m is not a multimodal model.", lambda body, pictures: pictures > 0),
}
# Bodies with status 200: {mode: text}.
BODIES = {
    "html": "<html><body>Sign in to the network</body></html>",
    "error200": '{"error": {"message": "upstream overloaded", "code": 529}}',
    "empty_body": "",
    "null_json": "null",
    "no_choices": '{"choices": []}',
    "null_choices": '{"choices": null}',
    "no_message": '{"choices": [{"index": 0, "finish_reason": "content_filter"}]}',
    "sse": 'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n',
}
# Contents of a message from which no verdict can be read: {mode: content}.
UNREADABLE = {
    "refusal": None,
    "length": "",
    "number": 1,
    "prose": "I would rather not say.",
    "no_fence": 'Sure: {"verdict": true}',
    "strings": '{"verdict": "true", "answer": 1, "better": 1, "best_first": "12"}',
}
# Contents from which it can, made of the right reply: {mode: function of it}.
READABLE = {
    "good": lambda reply: reply,
    "parts": lambda reply: [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                            {"type": "text", "text": reply[:5]}, {"type": "text", "text": reply[5:]}],
    "text_object": lambda reply: {"text": reply},
    "object": json.loads,
    "half_emoji": lambda reply: reply + " \ud83d",
    "nul": lambda reply: reply + "\0",
    "thinking": lambda reply: f'<think>\n{{"verdict": false}}\n</think>\n\n```json\n{reply}\n```',
    "fence": lambda reply: f"Here is my verdict:\n```JSON\n{reply}\n```\nIt is all there.",
    "reason": lambda reply: json.dumps({"reason": "seen in frame 2"} | json.loads(reply)),
    "control_tokens": lambda reply: f"<|begin_of_box|>{reply}<|end_of_box|>",
}
# Token counts that are no numbers.
USAGES = {"no_usage": None, "usage_text": {"prompt_tokens": "many", "completion_tokens": None}, "usage_list": [1]}


def right_reply(text):
    """What a judge of few doubts says: all is true, the longer note is better, and A is the answer."""
    candidates = len(re.findall(r"^\d+\. ", text, re.M))
    values = {"verdict": True, "best_first": list(range(1, candidates + 1)), "better": "tie", "answer": "A"}
    notes = re.search(r"First note: (.*)\nSecond note: (.*)", text)
    if notes and len(notes[1]) != len(notes[2]):
        values["better"] = "first" if len(notes[1]) > len(notes[2]) else "second"
    if '"entries":' in text:
        return json.dumps({"answer": "A", "entries": [1]})
    key = re.findall(r'\{"(\w+)":', text)[-1]
    return json.dumps({key: values[key]})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        mode = self.server.mode
        if callable(mode):
            mode = mode(body)
        *pictures, question = body["messages"][0]["content"]
        if mode in LIMITS:
            message, is_over = LIMITS[mode]
            if is_over(body, len(pictures)):
                self.answer(400, json.dumps({"error": {"message": message}}))
                return
            mode = "good"
        if mode == "tarpit":
            self.server.released.wait(60)
        if mode == "slow":
            time.sleep(0.3)
            mode = "good"
        if mode in ERRORS:
            status, message = ERRORS[mode]
            self.answer(status, json.dumps({"error": {"message": message}}))
        elif mode in BODIES:
            self.answer(200, BODIES[mode])
        elif mode in UNREADABLE:
            self.answer(200, as_completion(UNREADABLE[mode]))
        elif mode == "cut_json":
            self.answer(200, as_completion(right_reply(question["text"]))[:-40])
        elif mode == "cut_body":
            self.answer(200, '{"id": "x", ', length=9999)
        else:
            content = READABLE.get(mode, READABLE["good"])(right_reply(question["text"]))
            usage = USAGES.get(mode, {"prompt_tokens": 7, "completion_tokens": 3})
            self.answer(200, as_completion(content, usage))

    def answer(self, status, text, length=None):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def as_completion(content, usage=None):
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                       "choices": [choice], "usage": usage})


def serve(mode):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *request: None  # such as a client that has gone
    server.mode = mode
    server.seen = []
    server.released = threading.Event()          # ends what "tarpit" waits for
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
