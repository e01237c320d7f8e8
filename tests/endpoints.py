"""An OpenAI-compatible server in a thread, which behaves as a test says."""

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def serve(behave):
  """Serves `behave(question, attempt) -> (status, headers, bytes)`, or None to say nothing."""
  attempts, lock, over = {}, threading.Lock(), threading.Event()

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      question = body['messages'][0]['content']
      with lock:
        attempts.setdefault(question, []).append((self.path, self.headers['Authorization'], body))
        number = len(attempts[question])
      answer = behave(question, number)
      if answer is None:
        over.wait(10)
        return
      status, headers, content = answer
      with contextlib.suppress(OSError):
        self.send_response(status)
        for name, value in headers.items():
          self.send_header(name, value)
        self.send_header('Content-Length', str(headers.get('Content-Length', len(content))))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *unused):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.daemon_threads = True
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_port}/v1', attempts
  finally:
    over.set()
    server.shutdown()
    server.server_close()


def reply(text):
  """A good answer of a server."""
  return 200, {}, json.dumps({'choices': [{'message': {'content': text}}]}).encode()
