"""The keys of a recipe, a module for each section; `afina.recipe.schema` puts them together."""
