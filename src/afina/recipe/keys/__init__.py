"""The keys of a recipe, a module for each section; `afina.recipe.schema` puts them together.

data_keys     data, and its splits          train_keys         tokens and train        resource_keys   resources
adapter_keys  adapter
loss_keys     the loss, and its tasks       training_arguments train.arguments         section         what all sections share
"""
