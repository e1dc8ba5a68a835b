const link = document.getElementById("link");
const reach = "a, [tabindex]";
function put(id, html) {
  const place = document.getElementById(id);
  const scrolls = [...place.querySelectorAll(".scroll, .alone")].map((each) => each.scrollLeft);
  const held = [...place.querySelectorAll(reach)].indexOf(document.activeElement);
  place.innerHTML = html;
  place.querySelectorAll(".scroll, .alone").forEach((each, at) => (each.scrollLeft = scrolls[at] || 0));
  if (held >= 0) place.querySelectorAll(reach)[held]?.focus({ preventScroll: true });
}
const source = new EventSource("events");
source.addEventListener("parts", (event) => {
  for (const [id, html] of Object.entries(JSON.parse(event.data))) put(id, html);
  link.textContent = `As of ${new Date().toLocaleTimeString("en-GB")}.`;
});
source.addEventListener("error", () => (link.textContent = "No connection; trying again."));
