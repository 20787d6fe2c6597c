"""Configs of families that tests call by name."""

from __future__ import annotations

from ckptx.registry.families import family_named


def spec_from_config(config, family):
    return family_named(family).from_config(config)


def config_from_spec(spec):
    return family_named(spec.family).to_config(spec)


def differences(config, spec):
    return family_named(spec.family).config.differences(config, spec)


def merge_config(config, spec):
    return family_named(spec.family).config.merge_config(config, spec)


def table(family):
    return family_named(family).config.table
