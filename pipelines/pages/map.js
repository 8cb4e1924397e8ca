// The map: one stop of the Tab key; arrows go to the nearest picture that way; hover or focus shows it and its class.
const map = document.querySelector(".map"), tip = map.querySelector(".tip");
const dots = [...map.querySelectorAll("circle")];
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const place = dots.map(dot => [dot.cx.baseVal.value, dot.cy.baseVal.value]);
let at = 0, label = null;

function show(index) {
  const dot = dots[index], box = map.getBoundingClientRect(), point = dot.getBoundingClientRect();
  map.querySelector(".here")?.classList.remove("here");
  dot.classList.add("here");
  if (label !== dot.dataset.label) {
    label = dot.dataset.label;
    dots.forEach(other => other.classList.toggle("same", other.dataset.label === label));
  }
  map.classList.add("active");
  tip.querySelector("img").src = pictures[index];
  tip.querySelector("span").textContent = dot.getAttribute("aria-label");
  tip.hidden = false;
  const x = point.x - box.x + point.width + 8, y = point.y - box.y + 8;
  tip.style.left = Math.max(4, Math.min(x, box.width - tip.offsetWidth - 4)) + "px";
  tip.style.top = (y + tip.offsetHeight < box.height ? y : y - tip.offsetHeight - 24) + "px";
}

function hide() {
  map.classList.remove("active");
  map.querySelector(".here")?.classList.remove("here");
  tip.hidden = true;
}

function go(index) {
  dots[at].tabIndex = -1;
  dots[at].setAttribute("aria-selected", "false");
  at = index;
  dots[at].tabIndex = 0;
  dots[at].setAttribute("aria-selected", "true");
  dots[at].focus();
}

function toward(dx, dy) {
  let best = at, least = Infinity;
  place.forEach(([x, y], index) => {
    const along = (x - place[at][0]) * dx + (y - place[at][1]) * dy;
    const aside = Math.abs((x - place[at][0]) * dy - (y - place[at][1]) * dx);
    if (along > 0 && along >= aside && along + aside < least) [best, least] = [index, along + aside];
  });
  return best;
}

const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
map.addEventListener("keydown", event => {
  if (event.key === "Escape") return hide();
  const next = ways[event.key] ? toward(...ways[event.key]) : { Home: 0, End: dots.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  go(next);
});
const number = event => dots.indexOf(event.target);
map.addEventListener("focusin", event => number(event) >= 0 && show(number(event)));
map.addEventListener("focusout", hide);
map.addEventListener("pointerover", event => number(event) >= 0 && show(number(event)));
map.addEventListener("pointerout", event => (dots[at] === document.activeElement ? show(at) : hide()));
map.addEventListener("click", event => number(event) >= 0 && go(number(event)));
