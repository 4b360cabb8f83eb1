"use strict";
// Runs before the first drawing, so that a chosen theme does not flash in late.
try {
  const chosen = localStorage.getItem("theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.style.colorScheme = chosen;
} catch {
  // a browser that keeps nothing follows the system
}
