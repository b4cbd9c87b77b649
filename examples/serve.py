"""Serves a distilled student over HTTP as OpenAI's `/v1/completions` does, with Ray Serve and FastAPI.

    pip install --constraint constraints.txt ".[serve]"
    python examples/serve.py runs/quickstart/student
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
         -d '{"model": "student", "prompt": "The window", "max_tokens": 20, "stream": true}'

Listens on loopback. With `LECTERN_SERVE_KEY` set, requests need `Authorization: Bearer <that key>`: set it before you
let others in with `--host`. One request at a time is generated per replica; for many users serve the folder with vLLM.
"""

import argparse
import asyncio
import hmac
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

KEY_VARIABLE = "LECTERN_SERVE_KEY"

app = FastAPI(title="Lectern student")


class CompletionRequest(BaseModel):
    """The part of OpenAI's request that a student answers; what it does not know is refused, not passed over."""

    model_config = ConfigDict(extra="forbid")

    model: str = "student"
    prompt: str
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = None
    stream: bool = False


def authorized(request: Request) -> None:
    """Refuse a request without the key, where one is set."""
    key = os.environ.get(KEY_VARIABLE)
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key and not hmac.compare_digest(given.encode(), key.encode()):
        raise HTTPException(401, f"this server wants the key in {KEY_VARIABLE}")


@app.exception_handler(HTTPException)
async def in_openais_words(_: Request, error: HTTPException) -> JSONResponse:
    """Tell an error as OpenAI's clients expect it."""
    body = {"error": {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}}
    return JSONResponse(body, error.status_code)


def completion(name: str, request: CompletionRequest, text: str, reason: str | None) -> dict[str, Any]:
    """Return an answer, or a piece of one, in OpenAI's form. Above its user: Ray Serve takes the app as it is there."""
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    created = int(time.time())
    return {"id": name, "object": "text_completion", "created": created, "model": request.model, "choices": [choice]}


class TextPieces:
    """Turns tokens into text one by one, never half a character: bytes of one may be spread over several tokens."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._shown = 0
        """Tokens whose text has been given; one piece of context before them is kept, as spaces depend on it."""

    def add(self, token: int) -> str:
        """Return what a further token adds; nothing while a character is not whole."""
        self._tokens.append(token)
        text = self.rest()
        if text.endswith("\ufffd"):
            return ""
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)
        return text

    def rest(self) -> str:
        """Return the text of the tokens that have not been given."""
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._shown])) :]


@serve.deployment(ray_actor_options={"num_cpus": 1})
@serve.ingress(app)
class Student:
    """One copy of the student; Ray Serve makes as many as `--replicas` says."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).to(self.device).eval()
        self.positions = int(getattr(self.model.config, "max_position_embeddings", 0)) or None
        self._lock = threading.Lock()

    @app.get("/v1/models", dependencies=[Depends(authorized)])
    async def models(self) -> dict[str, Any]:
        """List the one model that there is."""
        return {"object": "list", "data": [{"id": "student", "object": "model", "owned_by": "lectern"}]}

    @app.post("/v1/completions", dependencies=[Depends(authorized)])
    async def completions(self, request: Annotated[CompletionRequest, ...]) -> Any:
        """Complete a prompt, in one piece or as server-sent events."""
        prompt = self.tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
        if not prompt:
            raise HTTPException(400, "the prompt holds no token")
        if self.positions is not None and len(prompt) + request.max_tokens > self.positions:
            raise HTTPException(
                400,
                f"{len(prompt)} tokens of prompt and max_tokens {request.max_tokens} are more than the student's "
                f"{self.positions} positions; shorten one of them",
            )
        name = f"cmpl-{uuid.uuid4().hex}"
        if request.stream:
            return StreamingResponse(self._events(name, prompt, request), media_type="text/event-stream")
        pieces = [piece async for piece in self._generate(prompt, request)]
        written, reason = pieces.pop()
        usage = {"prompt_tokens": len(prompt), "completion_tokens": written, "total_tokens": len(prompt) + written}
        return {**completion(name, request, "".join(text for text, _ in pieces), reason), "usage": usage}

    async def _events(self, name: str, prompt: list[int], request: CompletionRequest) -> AsyncIterator[str]:
        async for text, reason in self._generate(prompt, request):
            shown = text if isinstance(text, str) else ""
            yield f"data: {json.dumps(completion(name, request, shown, reason))}\n\n"
        yield "data: [DONE]\n\n"

    async def _generate(self, prompt: list[int], request: CompletionRequest) -> AsyncIterator[tuple[Any, str | None]]:
        """Yield pieces of text as they come, and last the number of tokens with why it ended."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        stop = threading.Event()

        def give(piece: Any) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            end: Any
            try:
                end = self._write(prompt, request, give, stop)
            except Exception as error:
                end = error
            give(end)

        threading.Thread(target=work, daemon=True).start()
        try:
            while isinstance(piece := await pieces.get(), str):
                yield piece, None
        finally:
            # A client that has gone away must not keep the model busy.
            stop.set()
        if isinstance(piece, Exception):
            raise piece
        yield piece

    def _write(
        self, prompt: list[int], request: CompletionRequest, give: Callable[[str], None], stop: threading.Event
    ) -> tuple[int, str]:
        """Generate in this thread; return the number of tokens and why it ended."""
        import torch
        from transformers.generation import StoppingCriteria, StoppingCriteriaList
        from transformers.generation.streamers import BaseStreamer

        pieces = TextPieces(lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True))

        class Stream(BaseStreamer):
            """Passes tokens on as text; the first that it gets are the prompt's."""

            has_prompt = False

            def put(self, value: Any) -> None:
                new, self.has_prompt = value.reshape(-1).tolist() if self.has_prompt else [], True
                for token in new:
                    if text := pieces.add(token):
                        give(text)

            def end(self) -> None:
                if text := pieces.rest():
                    give(text)

        class Gone(StoppingCriteria):
            """Ends what nobody waits for."""

            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor([prompt], device=self.device)
        draws = request.temperature > 0
        how = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p} if draws else {}
        # The seed is the process's, so that one request at a time may draw.
        with self._lock, torch.inference_mode():
            if request.seed is not None:
                torch.manual_seed(request.seed)
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_tokens,
                streamer=Stream(),
                stopping_criteria=StoppingCriteriaList([Gone()]),
                pad_token_id=self.tokenizer.eos_token_id or 0,
                **({"do_sample": False} | how),
            )
        number = written.shape[1] - len(prompt)
        return number, "length" if number == request.max_tokens else "stop"


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serves a distilled student, OpenAI-style.")
    parser.add_argument("folder", help="the exported student, e.g. runs/quickstart/student")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    folder = Path(options.folder).absolute()
    if not (folder / "config.json").is_file():
        parser.error(f"{folder} has no config.json; name the folder of an exported student")
    if options.host != "127.0.0.1" and not os.environ.get(KEY_VARIABLE):
        parser.error(f"--host {options.host} lets others in: set {KEY_VARIABLE} to a key that they must show")
    key = os.environ.get(KEY_VARIABLE)
    runtime = {"env_vars": {KEY_VARIABLE: key} if key else {}}
    serve.start(http_options={"host": options.host, "port": options.port})
    student = Student.options(  # type: ignore[attr-defined]
        num_replicas=options.replicas, ray_actor_options={"num_cpus": 1, "runtime_env": runtime}
    )
    serve.run(student.bind(str(folder)), name="student", route_prefix="/")
    print(f"serving {folder} at http://{options.host}:{options.port}/v1/completions", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
