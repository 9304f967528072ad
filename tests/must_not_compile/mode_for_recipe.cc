// Recipe and mode are different types, so exchanging them is not a quiet mistake.
#include "sluice/recipe.h"

sluice::LayerRecipe resolve() {
  using namespace sluice;
#ifdef MUST_NOT_COMPILE
  return resolve_recipe(Mode::kNormal, parse_recipe("direct"), DispatchDtype::kAuto, std::nullopt,
                        "");
#else
  return resolve_recipe(parse_recipe("direct"), Mode::kNormal, DispatchDtype::kAuto, std::nullopt,
                        "");
#endif
}
