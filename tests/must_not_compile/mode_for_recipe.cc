// Recipe and mode are different types, so exchanging them is not a quiet mistake.
#include "sluice/recipe.h"

sluice::Recipe resolve() {
  using namespace sluice;
#ifdef MUST_NOT_COMPILE
  return resolve_recipe(Mode::kNormal, RecipeName::kDirect, DispatchDtype::kAuto, std::nullopt, "");
#else
  return resolve_recipe(RecipeName::kDirect, Mode::kNormal, DispatchDtype::kAuto, std::nullopt, "");
#endif
}
