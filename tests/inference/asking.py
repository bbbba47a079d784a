"""Call generate and chat with the options of their command line as plain keywords."""

from dataclasses import fields

from launcher.inference import chat as chatting
from launcher.inference import generate as generating
from launcher.inference.options import Answering

SHARED = {field.name for field in fields(Answering)}


def split(options):
    """The shared options as Answering, and the command's own ones."""
    how = Answering(**{name: value for name, value in options.items() if name in SHARED})
    return how, {name: value for name, value in options.items() if name not in SHARED}


def generate(model, **options):
    how, own = split(options)
    return generating.generate(model, how, **own)


def chat(model, **options):
    how, own = split(options)
    return chatting.chat(model, how, **own)
