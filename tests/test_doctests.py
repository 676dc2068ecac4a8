"""The examples in the docstrings of what needs torch alone say what is so."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import lavis_mafa.grit
import lavis_mafa.objectives

MODULES = ["lavis_mafa.models.vit"] + [
    module.name
    for room in (lavis_mafa.objectives, lavis_mafa.grit)
    for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_are_true(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    assert sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name))) > 25
