"""PEFT's files of adapters, read and written.

reading    what an adapter's file means where its configuration leaves it open
repeats    what PEFT's files hold twice, or hold of the base
adapter    an adapter's folder, read without a model
fitting    whether it fits a base
writing    an adapter of a model as PEFT's folder
"""
