"""The faulty server's batch API: files, and batches that are executed when they were polled often enough."""

import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Job:
    """A batch as the endpoint knows it."""

    file: str
    metadata: dict[str, str]
    polls: int = 0
    status: str = "in_progress"
    output: str | None = None
    errors: str | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"total": 0, "completed": 0, "failed": 0})


class Batches:
    """Files and batches of one server (`faulty_server.Server`), whose answers and refusals they use."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, Job] = {}

    def add_routes(self, app: web.Application) -> None:
        """Serve below /v1."""
        app.router.add_post("/v1/files", self.upload)
        app.router.add_get("/v1/files/{id}/content", self.content)
        app.router.add_post("/v1/batches", self.create)
        app.router.add_get("/v1/batches", self.list)
        app.router.add_get("/v1/batches/{id}", self.retrieve)

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        return self._file(form["file"].file.read())  # type: ignore[union-attr]

    def _file(self, data: bytes) -> web.Response:
        return web.json_response({"id": self._keep(data), "object": "file", "bytes": len(data), "created_at": 0,
                                  "filename": "x.jsonl", "purpose": "batch", "status": "processed"})  # fmt: skip

    def _keep(self, data: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return name

    async def content(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["id"]])

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        own = self.server.settings
        if own.batch_fault == "lost":
            own.batch_fault = ""
            return web.json_response({"error": {"message": "gateway"}}, status=502)
        name = f"batch-{len(self.jobs)}"
        self.jobs[name] = Job(body["input_file_id"], body.get("metadata") or {})
        if own.batch_fault == "unheard":
            own.batch_fault = ""
            return web.json_response({"error": {"message": "gateway"}}, status=502)
        return web.json_response(self._shown(name))

    async def list(self, request: web.Request) -> web.Response:
        names = list(reversed(self.jobs))
        after = request.query.get("after")
        first = names.index(after) + 1 if after else 0
        page = names[first : first + 2]
        data = [self._shown(name) for name in page]
        return web.json_response({"object": "list", "data": data, "has_more": first + 2 < len(names)})

    async def retrieve(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        job = self.jobs[name]
        job.polls += 1
        if job.polls > self.server.settings.batch_polls and job.status == "in_progress":
            self._execute(job)
        return web.json_response(self._shown(name))

    def _execute(self, job: Job) -> None:
        own = self.server.settings
        lines = [json.loads(line) for line in self.files[job.file].splitlines()]
        if own.batch_fault == "failed":
            job.status = "failed"
            return
        executed = lines[: len(lines) // 2] if own.batch_fault == "expired" else lines
        answers, errors = [], []
        for line in executed:
            body = line["body"]
            self.server.asked[line["custom_id"]] += 1
            refusal = self.server.refusal_of(body)
            if refusal is not None:
                status, text = refusal
                errors.append({"custom_id": line["custom_id"], "response": {"status_code": status, "body": text}})
                continue
            reply = self.server._reply(line["url"].endswith("/chat/completions"), body)
            usage = reply["usage"]
            self.server.bill(usage["prompt_tokens"], usage["completion_tokens"], own.batch_price)
            if own.batch_fault == "no-usage":
                del reply["usage"]
            self.server.good[line["custom_id"]] += 1
            answers.append({"custom_id": line["custom_id"], "response": {"status_code": 200, "body": reply}})
        job.counts = {"total": len(lines), "completed": len(answers), "failed": len(errors)}
        job.status = "expired" if own.batch_fault == "expired" else "completed"
        job.output = self._keep("".join(f"{json.dumps(line)}\n" for line in answers).encode())
        job.errors = self._keep("".join(f"{json.dumps(line)}\n" for line in errors).encode()) if errors else None

    def _shown(self, name: str) -> dict[str, Any]:
        job = self.jobs[name]
        problem = [{"message": "the file is malformed"}] if job.status == "failed" else None
        return {
            "id": name, "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": job.file,
            "completion_window": "24h", "created_at": 0, "status": job.status, "metadata": job.metadata,
            "output_file_id": job.output, "error_file_id": job.errors, "request_counts": job.counts,
            "errors": {"object": "list", "data": problem} if problem else None,
        }  # fmt: skip
