"""A chat-completions server in a thread of the tests, which answers, stalls, refuses and breaks as it is told."""

import contextlib
import http.server
import json
import threading
import time


def said(text, top=(), usage=(11, 3)):
    """Returns the JSON of a response with this text; ``top`` holds [(token, [(token, log-prob), ...]), ...]."""
    content = [
        {"token": token, "top_logprobs": [{"token": other, "logprob": p} for other, p in pairs]} for token, pairs in top
    ]
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "logprobs": {"content": content}}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
    }


class ChatServer:
    """What the server was asked, and its url. ``reply`` is (number of the request, body) -> what to do:

    JSON or text (status 200); (status, headers, JSON or text); "close": to break off; a number: seconds to stall first,
    and then break off.
    """

    def __init__(self, reply):
        self.reply, self.bodies, self.paths, self.keys = reply, [], [], []
        self.at_work = self.most_at_work = 0
        self.lock, self.url = threading.Lock(), None

    def answer(self, handler):
        """Answers one request."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.paths.append(handler.path)
            self.keys.append(handler.headers.get("Authorization"))
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
        reply = self.reply(number, body)
        with self.lock:
            self.at_work -= 1
        if reply == "close" or isinstance(reply, float):
            time.sleep(reply if isinstance(reply, float) else 0)
            handler.close_connection = True
            return
        status, headers, content = reply if isinstance(reply, tuple) else (200, {}, reply)
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client may have gone
            handler.wfile.write(data)


@contextlib.contextmanager
def serve(reply):
    """Yields a ChatServer that is served on a free port of this machine."""
    chat = ChatServer(reply)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as real servers do
        wbufsize = 2**16  # one packet a response: the second of two would wait 40 ms for the first

        def do_POST(self):
            chat.answer(self)

        def log_message(self, *words):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
