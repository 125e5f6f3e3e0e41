"""Bots that know nothing of the world: what a number is worth is seen beside what they get."""

import re
import zlib

from llmjax.data.records import Prompt
from llmjax.tasks.world import language
from llmjax.tasks.world.judge import kind_of_open, question_of

CONSTANT = "Sure! I am happy to help. Have a nice day!"


def template_bot(prompt: Prompt) -> str:
    """A polite, complete, fluent sentence of the asked form, with a value of the asked type that is drawn blindly."""
    question = question_of(prompt)
    draw = zlib.crc32(prompt.id.encode())
    value = question.candidates[draw % len(question.candidates)]
    polite = language.COURTESY_FIRST[0]
    if question.kind in ("sum", "difference"):
        a, b = question.subject.split()[::2]
        templates = {"sum": language.SUM_ANSWERS, "difference": language.DIFFERENCE_ANSWERS}[question.kind]
        return f"{polite} {templates[0].format(a=a, b=b, r=value)}"
    name = question.subject
    if question.kind == "open":
        told = [a for a in language.ATTRIBUTES[kind_of_open(question)] if a.type in language.VALUES]
        attribute = told[draw % len(told)]
        value = language.VALUES[attribute.type][draw % len(language.VALUES[attribute.type])]
    else:
        attribute = language.BY_NAME[question.attribute]
        if question.kind == "reverse":
            name, value = value, question.subject
    article = "the " if attribute.kind == "thing" else ""
    return f"{polite} {language.fill(attribute.answers[0], article + name, value)}"


def constant_bot(prompt: Prompt) -> str:
    """The same friendly words, whatever is asked."""
    del prompt
    return CONSTANT


def word_list_bot(prompt: Prompt) -> str:
    """Every value of the asked type in a row."""
    return f"{', '.join(question_of(prompt).candidates)}."


def echo_bot(prompt: Prompt) -> str:
    """The words of the question as an answer."""
    return re.sub(r"[?.]*$", ".", prompt.text)
