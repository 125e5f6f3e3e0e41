"""The words that everything above the models speaks: messages, prompts, completions, rankings. Plain data without JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue.

    role: one of ROLES. content: any text; control tokens in it stay text. Some templates tell None, where an assistant
    only calls tools, from "". extra: what else a chat template reads of a message ("tool_calls", "name", "tool_call_id").
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dialogue:
    """What SFT learns from: the assistant's turns.

    tools: definitions that the template is given, as JSON values. id: where it stands, for messages to people.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    id: str = field(default="", compare=False)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a dialogue that the assistant is to go on with.

    fields: whatever a reward may look at and the model does not see: the reference answer, the source. Prompts of equal
    fields["group"] ask for the same thing in other words: errors are clustered by it. tools: as in `Dialogue`.
    """

    id: str
    messages: tuple[Message, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def group(self) -> str:
        """fields["group"]; its id, where it has none."""
        return str(self.fields.get("group", self.id))

    @property
    def text(self) -> str:
        """The last message that is not the assistant's, for people to read."""
        asked = [message.content or "" for message in self.messages if message.role != "assistant"]
        return asked[-1] if asked else ""


@dataclass(frozen=True)
class Completion:
    """What a model, or a person, answered.

    text: without control tokens. tokens: as they were sampled, with the token that ended it; () for text that no model of
    ours wrote. log_probs: of each token under the distribution it was sampled from. ended: whether it ended itself.
    """

    text: str
    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    ended: bool = True


@dataclass(frozen=True)
class Ranking:
    """Two or more completions of one prompt in order of preference.

    ranks: one for each completion, 0 is best, equal ranks are ties. scores: what the ranks were made of, where that is known
    (higher is better, without the annotator's error), else (). edited_from: for each completion the number of the one that a
    person changed to make it, -1 where it is as a model wrote it; () for no edits.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] = ()
    edited_from: tuple[int, ...] = ()


def user(text: str) -> tuple[Message, ...]:
    """The messages of a prompt of one turn."""
    return (Message("user", text),)
