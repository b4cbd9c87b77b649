"""What a dataset of a teacher behind an API was captured from: its weights are known by name alone."""

from hashlib import blake2b
from pathlib import Path

from storage.config import CacheConfig
from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity, canonical_json
from storage.tokenizer import Tokenizer
from workers.config import TeacherConfig
from workers.model_folder import model_facts


def api_identity(
    folder: Path, teacher: TeacherConfig, cache: CacheConfig, tokenizer: Tokenizer, uses_chat_template: bool
) -> DatasetIdentity:
    """Return the identity of what an endpoint's model gives: endpoint, model and revision stand for the weights."""
    api = teacher.api
    named = canonical_json([api.base_url, api.model, teacher.revision, api.extra_body])
    template = tokenizer.chat_template if uses_chat_template else None
    return DatasetIdentity(
        teacher=TeacherIdentity(
            name=f"{api.model} at {api.base_url}",
            revision=teacher.revision,
            architecture=model_facts(folder).architecture,
            weights=blake2b(named, digest_size=32, person=b"lectern.api").hexdigest(),
            parameters=0,
        ),
        tokenizer=TokenizerIdentity.of(tokenizer),
        chat_template=None if template is None else blake2b(template.encode(), digest_size=16).hexdigest(),
        precision=teacher.dtype,
        capture=CaptureIdentity.of(cache),
    )
