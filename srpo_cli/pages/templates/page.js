"use strict";
// What is folded on the screen is printed all the same, but for the figures of single prompts; pictures are waited for.
(() => {
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")].filter((each) => !each.closest(".prompt"));
    for (const each of folded) each.open = true;
    for (const picture of document.images) picture.loading = "eager";
  });
  addEventListener("afterprint", () => {
    for (const each of folded) each.open = false;
  });
})();
