"""End-to-end checks of the release binary with clients this project did not write.

    python tests/e2e/run.py target/release/quire

Needs: openai, grpcio, grpcio-tools, grpcio-health-checking, grpcio-reflection. Serves the embedded model on free
loopback ports, runs every check, prints one line each, and ends with 'N passed, N failed'.
"""

import importlib
import json
import os
import re
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request

import openai

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


class Server:
    """One `quire serve` process; knows its URLs once it has printed them."""

    def __init__(self, binary, *args, authority=None):
        self.binary, self.started = binary, time.monotonic()
        self.tls = ssl.create_default_context(cafile=authority) if authority else None
        self.process = subprocess.Popen(
            [binary, "serve", "--port", "0", "--grpc-port", "0", *args],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines, self.http, self.grpc = [], None, None
        self.up = threading.Event()
        threading.Thread(target=self.read, daemon=True).start()
        if not self.up.wait(60):
            self.process.kill()
            raise RuntimeError("no URLs within 60 s:\n" + "".join(self.lines))
        self.wait_ready()

    def read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"^http\s+(https?://127\.0\.0\.1:\d+)", line):
                self.http = self.http or found.group(1)
            if found := re.search(r"^grpc\s+(127\.0\.0\.1:\d+)", line):
                self.grpc = found.group(1)
            if self.http and self.grpc:
                self.up.set()
        self.up.set()

    def wait_ready(self):
        while time.monotonic() - self.started < 60:
            try:
                if get(self.http + "/health/ready", tls=self.tls)[0] == 200:
                    self.seconds_to_ready = time.monotonic() - self.started
                    return
            except OSError:
                pass
            time.sleep(0.01)
        raise RuntimeError("not ready within 60 s:\n" + "".join(self.lines))

    def client(self):
        return openai.OpenAI(base_url=self.http + "/v1", api_key="none", max_retries=0)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def get(url, headers=None, tls=None):
    try:
        request = urllib.request.Request(url, headers=headers or {})
        with urllib.request.urlopen(request, timeout=10, context=tls) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def post(url, body, headers=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def messages(text):
    return [{"role": "user", "content": text}]


@check
def ready_in_under_a_second(server):
    assert server.seconds_to_ready < 1.0, f"{server.seconds_to_ready:.2f} s"
    print(f"    ready after {server.seconds_to_ready:.2f} s")


@check
def models_are_listed(server):
    listed = [model.id for model in server.client().models.list()]
    assert listed == ["quire-demo"], listed
    assert server.client().models.retrieve("quire-demo").id == "quire-demo"


@check
def chat_answers_coherently(server):
    answer = server.client().chat.completions.create(
        model="quire-demo", messages=messages("What is Quire?"), temperature=0, max_tokens=80)
    text = answer.choices[0].message.content
    print("    " + text)
    assert "Quire" in text and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 0 and answer.usage.total_tokens == (
        answer.usage.prompt_tokens + answer.usage.completion_tokens)


@check
def chat_streams_the_same_text(server):
    client = server.client()
    ask = dict(model="quire-demo", messages=messages("Tell me a short story about a fox."), temperature=0, max_tokens=96)
    whole = client.chat.completions.create(**ask)
    pieces, usage, finish = [], None, None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            pieces.append(chunk.choices[0].delta.content or "")
            finish = chunk.choices[0].finish_reason or finish
        usage = chunk.usage or usage
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3, "it must stream, not arrive at once"
    assert finish == whole.choices[0].finish_reason and usage.completion_tokens == whole.usage.completion_tokens


@check
def completions_report_logprobs(server):
    answer = server.client().completions.create(
        model="quire-demo", prompt="Hello", max_tokens=5, temperature=0, logprobs=3, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert "".join(logprobs.tokens) == answer.choices[0].text and answer.choices[0].text.startswith("Hello")
    generated = logprobs.top_logprobs[-1]
    assert len(generated) >= 3 and max(generated.values()) == logprobs.token_logprobs[-1]


@check
def n_choices_and_seeds(server):
    ask = dict(model="quire-demo", prompt="Once upon a time", max_tokens=12, temperature=1.0, seed=7, n=3)
    first, second = (server.client().completions.create(**ask) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices], "a seed replays"
    assert len(set(texts)) > 1, "choices differ"


@check
def stop_strings_cut_the_text(server):
    whole = server.client().completions.create(model="quire-demo", prompt="Count: one two", max_tokens=24, temperature=0)
    words = whole.choices[0].text.split()
    stop = words[len(words) // 2]
    cut = server.client().completions.create(
        model="quire-demo", prompt="Count: one two", max_tokens=24, temperature=0, stop=[stop])
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].text == whole.choices[0].text.split(stop)[0]


@check
def errors_name_the_field(server):
    client = server.client()
    for kwargs, field in [
        (dict(temperature=-1), "temperature"), (dict(top_p=2), "top_p"), (dict(n=0), "n"),
        (dict(max_tokens=0), "max_tokens"), (dict(logit_bias={"999999": 1}), "logit_bias"),
        (dict(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    ]:
        try:
            client.chat.completions.create(model="quire-demo", messages=messages("hi"), **kwargs)
            raise AssertionError(f"{kwargs} was accepted")
        except openai.BadRequestError as error:
            assert field in str(error.param) or field in error.message, (kwargs, error.message)
    try:
        client.chat.completions.create(model="no-such-model", messages=messages("hi"))
        raise AssertionError("an unknown model was accepted")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    status, body, _ = post(server.http + "/v1/completions", b'{"model": "quire-demo", "prompt": "x" * 3}')
    assert status == 400 and json.loads(body)["error"]["type"] == "invalid_request_error"
    status, _, _ = post(server.http + "/v1/completions", {"model": "quire-demo", "prompt": "x " * 5_000_000})
    assert status == 413, status
    assert get(server.http + "/health/ready")[0] == 200, "the server keeps serving"


@check
def thirty_two_streams_interleave(server):
    ask = dict(model="quire-demo", temperature=0, max_tokens=96, ignore_eos=True)
    talks = [messages(f"Tell me a short story about {number} birds.") for number in range(32)]
    begin = time.monotonic()
    arrivals = stream_together(server, [dict(ask, messages=talk, stream=True) for talk in talks])
    seconds = time.monotonic() - begin
    firsts, lasts = {}, {}
    for at, number, _ in arrivals:
        firsts.setdefault(number, at)
        lasts[number] = at
    overlapping = sum(max(firsts.values()) < lasts[number] for number in lasts)
    switches = sum(a[1] != b[1] for a, b in zip(arrivals, arrivals[1:]))
    print(f"    {len(arrivals)} parts in {seconds:.2f} s, {switches} switches between streams, {overlapping} of 32 overlap")
    # A server that answered in turn would show 31 switches.
    assert len(lasts) == 32 and overlapping >= 24 and switches >= 4 * 32
    client = server.client()
    for number in (0, 5, 31):
        alone = client.chat.completions.create(
            model="quire-demo", messages=talks[number], temperature=0, max_tokens=96, extra_body={"ignore_eos": True})
        together = streamed_text(b"".join(part for _, of, part in arrivals if of == number))
        assert together and alone.choices[0].message.content == together, "the same bytes, alone or among 32"


def stream_together(server, bodies):
    """Posts all chat requests at once and returns (time, number, bytes) of all that comes back, in order of arrival.

    One loop over raw sockets that looks at nothing before the end: a client that parsed as it read would be slower than
    the server, and the order would be that of its own threads."""
    host, port = server.http.removeprefix("http://").split(":")
    selector, arrivals = selectors.DefaultSelector(), []
    for number, body in enumerate(bodies):
        connection = socket.create_connection((host, int(port)))
        selector.register(connection, selectors.EVENT_READ, number)
    for key, body in zip(list(selector.get_map().values()), bodies):
        data = json.dumps(body).encode()
        head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n")
        key.fileobj.sendall(head.encode() + data)
    until = time.monotonic() + 60
    while selector.get_map():
        assert time.monotonic() < until, f"{len(selector.get_map())} streams had not ended after 60 s"
        for key, _ in selector.select(1):
            if part := key.fileobj.recv(1 << 16):
                arrivals.append((time.monotonic(), key.data, part))
            else:
                selector.unregister(key.fileobj)
                key.fileobj.close()
    return arrivals


def streamed_text(response):
    """The text of a whole streamed chat answer: head, chunked body, server-sent events."""
    head, _, rest = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"transfer-encoding: chunked" in head.lower(), head
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            break
        body, rest = body + rest[:int(size, 16)], rest[int(size, 16) + 2:]
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    assert events.pop() == b"[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@check
def deadlines_and_request_ids(server):
    status, _, headers = post(
        server.http + "/v1/completions", {"model": "quire-demo", "prompt": "Hi", "max_tokens": 2, "temperature": 0},
        {"x-request-id": "check-1"})
    assert status == 200 and headers["x-request-id"] == "check-1"
    status, body, _ = post(
        server.http + "/v1/completions",
        {"model": "quire-demo", "prompt": "Hi", "max_tokens": 1500, "ignore_eos": True}, {"x-request-timeout-ms": "5"})
    assert status == 504, (status, body)


@check
def metrics_have_both_names(server):
    page = get(server.http + "/metrics")[1]
    for name in ["quire_requests_running", "quire_kv_cache_usage_ratio", "vllm:num_requests_running",
                 "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:time_to_first_token_seconds_bucket",
                 "vllm:generation_tokens_total", "quire_build_info"]:
        assert re.search(rf"^{re.escape(name)}[ {{]", page, re.M), f"{name} is missing"
    assert " summary" not in page
    total = sum(float(value) for value in re.findall(r"^quire_generation_tokens_total\{[^}]*\} (\S+)$", page, re.M))
    assert total > 100, total


def load_proto(folder):
    from grpc_tools import protoc
    root = os.path.join(HERE, "..", "..", "proto")
    code = protoc.main(["protoc", f"-I{root}", f"--python_out={folder}", f"--grpc_python_out={folder}",
                        os.path.join(root, "quire/v1/inference.proto")])
    assert code == 0
    sys.path.insert(0, folder)
    return (importlib.import_module("quire.v1.inference_pb2"), importlib.import_module("quire.v1.inference_pb2_grpc"))


@check
def grpc_gives_the_same_tokens(server):
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
    pb, stubs = load_proto(tempfile.mkdtemp())
    with grpc.insecure_channel(server.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="quire.v1.Inference"))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert "quire.v1.Inference" in services, services
        stub = stubs.InferenceStub(channel)
        request = pb.GenerateRequest(
            text="Once upon a time", sampling=pb.Sampling(temperature=0.8, seed=11),
            stopping=pb.Stopping(max_tokens=24))
        whole = stub.Generate(request).choices[0]
        streamed = list(stub.GenerateStream(request))
        assert "".join(chunk.choice.text for chunk in streamed) == whole.text
        over_http = server.client().completions.create(
            model="quire-demo", prompt="Once upon a time", temperature=0.8, seed=11, max_tokens=24,
            extra_body={"return_token_ids": True})
        assert over_http.choices[0].text == whole.text
        assert over_http.choices[0].model_extra["token_ids"] == list(whole.token_ids)
        try:
            stub.Generate(pb.GenerateRequest(text="Hi", stopping=pb.Stopping(max_tokens=1500, ignore_eos=True)), timeout=0.02)
            raise AssertionError("the deadline did not end the call")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
        try:
            stub.Generate(pb.GenerateRequest(text="Hi", sampling=pb.Sampling(temperature=-1)))
            raise AssertionError("a negative temperature was accepted")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "temperature" in error.details(), error


@check
def tls_as_the_manual_says(server):
    """The certificate of docs/tls.md, made by openssl, under Python's own TLS, openai and grpcio."""
    import grpc
    manual = open(os.path.join(HERE, "..", "..", "docs", "tls.md")).read()
    folder = tempfile.mkdtemp()
    subprocess.run(re.search(r"^openssl (?:.*\\\n)*.*$", manual, re.M).group(0), shell=True, check=True, cwd=folder,
                   stderr=subprocess.DEVNULL)
    cert, key = (os.path.join(folder, name) for name in ["cert.pem", "key.pem"])
    encrypted = Server(server.binary, "--tls-cert", cert, "--tls-key", key, authority=cert)
    try:
        assert encrypted.http.startswith("https://"), encrypted.http
        with openai.DefaultHttpxClient(verify=encrypted.tls) as http:
            client = openai.OpenAI(base_url=encrypted.http + "/v1", api_key="none", max_retries=0, http_client=http)
            pieces = client.completions.create(
                model="quire-demo", prompt="Once upon a time", temperature=0, max_tokens=24, stream=True)
            text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        pb, stubs = load_proto(tempfile.mkdtemp())
        credentials = grpc.ssl_channel_credentials(open(cert, "rb").read())
        with grpc.secure_channel(encrypted.grpc.replace("127.0.0.1", "localhost"), credentials) as channel:
            request = pb.GenerateRequest(text="Once upon a time", sampling=pb.Sampling(temperature=0),
                                         stopping=pb.Stopping(max_tokens=24))
            chunks = list(stubs.InferenceStub(channel).GenerateStream(request))
        assert text and text == "".join(chunk.choice.text for chunk in chunks), (text, chunks)
        try:
            get(encrypted.http + "/health")
            raise AssertionError("a client that does not know the authority was served")
        except urllib.error.URLError as error:
            assert "certificate verify failed" in str(error), error
    finally:
        assert encrypted.stop() == 0


@check
def tenants_get_what_the_manuals_example_says(server):
    """docs/tenants.toml, as it is, served to the official clients."""
    import grpc
    example = os.path.join(HERE, "..", "..", "docs", "tenants.toml")
    limited = Server(server.binary, "--tenants", example)
    client = lambda key: openai.OpenAI(base_url=limited.http + "/v1", api_key=key, max_retries=0)
    ask = lambda key, max_tokens: client(key).chat.completions.with_raw_response.create(
        model="quire-demo", messages=messages("Hi"), max_tokens=max_tokens)

    def refused(error, key, max_tokens=1):
        try:
            ask(key, max_tokens)
        except error as refusal:
            return refusal
        raise AssertionError(f"{key} was not refused with {error}")

    try:
        answer = ask("sk-acme-2027", 3)
        assert answer.parse().usage.completion_tokens <= 3
        assert answer.headers["x-ratelimit-limit-requests"] == "600", dict(answer.headers)
        assert answer.headers["x-ratelimit-limit-tokens"] == "200000", dict(answer.headers)
        assert client("sk-acme-2027").models.list().data[0].id == "quire-demo"
        refused(openai.AuthenticationError, "sk-nobody")
        refused(openai.PermissionDeniedError, "sk-prometheus")
        too_large = refused(openai.APIStatusError, "sk-acme-2027", 8193)
        assert (too_large.status_code, too_large.param) == (413, "max_tokens"), too_large
        deadline = time.monotonic() + 60
        while True:  # ten at once, then one a second
            try:
                ask("sk-indexer", 1)
            except openai.RateLimitError as error:
                assert (error.code, error.param) == ("rate_limit_exceeded", "rpm"), error
                assert int(error.response.headers["retry-after"]) >= 1
                break
            assert time.monotonic() < deadline, "60 a minute were never reached"
        pb, stubs = load_proto(tempfile.mkdtemp())
        with grpc.insecure_channel(limited.grpc) as channel:
            stub = stubs.InferenceStub(channel)
            try:
                stub.Generate(pb.GenerateRequest(text="Hi"), metadata=[("authorization", "Bearer sk-prometheus")])
                raise AssertionError("a key without the scope was accepted")
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.PERMISSION_DENIED, error
            while True:
                try:
                    request = pb.GenerateRequest(text="Hi", stopping=pb.Stopping(max_tokens=1))
                    stub.Generate(request, metadata=[("authorization", "Bearer sk-indexer")])
                except grpc.RpcError as error:
                    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
                    trailers = dict(error.trailing_metadata())
                    assert int(trailers["retry-after"]) >= 1 and "x-ratelimit-limit-requests" in trailers, trailers
                    break
                assert time.monotonic() < deadline + 60, "60 a minute were never reached"
        page = get(limited.http + "/metrics", {"authorization": "Bearer sk-prometheus"})[1]
        throttled = re.search(r'^quire_tenant_throttled_total\{tenant="nightly-batch",limit="rpm"\} (\d+)$', page, re.M)
        assert throttled and int(throttled.group(1)) >= 2, throttled
    finally:
        limited.stop()


@check
def tenants_are_served_by_their_weights(server):
    """Three to one, while both always wait. All requests lie in the server's queue before the first of them runs, and
    what was served is read from the server's own page, so it does not matter how fast this client is. Long prompts: whose
    turn it is stays so for some thousand tokens, which is to be little beside what is served in all."""
    import hashlib
    tenants = tempfile.NamedTemporaryFile("w", suffix=".toml", delete=False)
    for name, weight, scopes in [("heavy", 3, ["infer"]), ("light", 1, ["infer"]), ("holder", 1, ["infer", "metrics"])]:
        digest = hashlib.sha256(f"sk-{name}".encode()).hexdigest()
        tenants.write(f"[[tenants]]\nid = '{name}'\nweight = {weight}\n[[tenants.keys]]\nid = 'key'\n"
                      f"sha256 = '{digest}'\nscopes = {json.dumps(scopes)}\n")
    tenants.close()
    shared = Server(server.binary, "--tenants", tenants.name, "--executor", "mock", "--mock-step-time", "20ms",
                    "--max-num-seqs", "4", "--max-queued-requests", "1000",
                    "--max-num-batched-tokens", "8192", "--no-prefix-cache")
    address = shared.http.removeprefix("http://").split(":")
    sockets = []

    def send(tenant, prompt_tokens, max_tokens):
        body = json.dumps({"prompt": [7] * prompt_tokens, "max_tokens": max_tokens, "ignore_eos": True}).encode()
        connection = socket.create_connection((address[0], int(address[1])), timeout=30)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                           b"authorization: Bearer sk-%s\r\ncontent-length: %d\r\n\r\n" % (tenant.encode(), len(body)) + body)
        sockets.append(connection)
        return connection

    def value(page, series):
        found = re.search("^" + re.escape(series) + r"(?:\{[^}]*\})? ([0-9.e+]+)$", page, re.M)
        return float(found.group(1)) if found else 0.0

    def page():
        return get(shared.http + "/metrics", {"authorization": "Bearer sk-holder"})[1]

    def served(page, tenant):
        return value(page, f'quire_tenant_tokens_total{{tenant="{tenant}",kind="output"}}')

    def wait_for(what, condition):
        deadline = time.monotonic() + 60
        while not condition(text := page()):
            assert time.monotonic() < deadline, f"{what} never happened:\n" + text
            time.sleep(0.02)
        return text

    try:
        holders = [send("holder", 8, 2000) for _ in range(4)]
        wait_for("a full batch", lambda page: value(page, "quire_requests_running") == 4)
        for _ in range(150):
            send("heavy", 1900, 16)
            send("light", 1900, 16)
        wait_for("a full queue", lambda page: value(page, "quire_requests_waiting") == 300)
        for holder in holders:
            holder.close()
        # Of 150 requests each: early enough that heavy still waits, late enough that single requests do not show.
        text = wait_for("service", lambda page: served(page, "heavy") >= 60 * 16)
        heavy, light = served(text, "heavy") / 16, served(text, "light") / 16
        assert heavy < 145, f"looked too late: {heavy} of 150 requests are done"
        # A turn is 4,096 weighted tokens: six requests of heavy, or two of light.
        assert abs(light - heavy / 3) <= 6, f"{heavy} to {light} requests, not 3 to 1"
        print(f"    {heavy:.0f} to {light:.0f} requests at weights of 3 to 1")
    finally:
        for connection in sockets:
            connection.close()
        shared.stop()
        os.unlink(tenants.name)


@check
def drains_on_sigterm(server):
    client = server.client()
    stream = client.completions.create(
        model="quire-demo", prompt="Hello", max_tokens=1500, temperature=0, stream=True, extra_body={"ignore_eos": True})
    iterator = iter(stream)
    next(iterator)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    status, _, headers = post(server.http + "/v1/completions", {"model": "quire-demo", "prompt": "Hi", "max_tokens": 1})
    live = get(server.http + "/health/live")[0]
    ready = get(server.http + "/health/ready")[0]
    rest = list(iterator)
    code = server.process.wait(60)
    assert (status, live, ready) == (503, 200, 503), (status, live, ready)
    assert headers["connection"] == "close" and headers["retry-after"], dict(headers)
    assert rest[-1].choices[0].finish_reason == "length", "the running stream finished"
    assert code == 0, code


def main():
    server = Server(sys.argv[1])
    passed = failed = 0
    try:
        for function in CHECKS:
            try:
                function(server)
                passed += 1
                print(f"ok   {function.__name__}")
            except Exception:
                failed += 1
                print(f"FAIL {function.__name__}")
                traceback.print_exc()
    finally:
        if server.process.poll() is None:
            server.process.kill()
    if failed:
        print("".join(server.lines)[-4000:])
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
