"""The report in a real browser: clicks, keys, themes, sizes, and no request to anywhere."""

import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditopt.report_page import write_report

from .folders import make_plan, write_analysis, write_everything, write_profile

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium with a profile of its own, or a skip that says what is missing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page with everything, and one of a profile alone."""
    base = tmp_path_factory.mktemp("pages")
    plan = write_everything(base / "prof")
    write_report(base / "prof", base / "report.html", plan)
    write_profile(base / "bare", maps=False)
    write_report(base / "bare", base / "bare.html")
    return base


class Tab:
    """One page in the browser."""

    def __init__(self, driver, path, *, theme="light", width=1280):
        self.driver = driver
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
        self.resize(width)
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        driver.get(Path(path).resolve().as_uri())
        self.wait("return document.readyState === 'complete'")

    def resize(self, width, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, script):
        for _ in range(400):
            if self.run(script):
                return
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}")

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, *keys):
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            self.run("return document.activeElement")  # waits for what the last key did
            self.driver.switch_to.active_element.send_keys(getattr(Keys, key, key))

    def focused(self):
        return self.run("return document.activeElement.getAttribute('aria-label')")

    def pixels(self):
        return np.asarray(Image.open(io.BytesIO(self.driver.get_screenshot_as_png())))

    def canvas(self, selector):
        """RGBA [rows, columns, 4] of a canvas."""
        script = """
            const canvas = document.querySelector(arguments[0]);
            const size = [canvas.width, canvas.height];
            return [...size, [...canvas.getContext("2d").getImageData(0, 0, ...size).data]];
        """
        width, height, values = self.run(script, selector)
        return np.array(values).reshape(height, width, 4)


@pytest.fixture
def tab(chromium, pages):
    return Tab(chromium, pages / "report.html")


@pytest.mark.parametrize("page", ["report.html", "bare.html"])
def test_no_error_and_no_request(page, chromium, pages):
    tab = Tab(chromium, pages / page)
    tab.wait("return document.querySelectorAll('.cell').length > 0")
    time.sleep(0.2)
    assert chromium.get_log("browser") == []
    messages = [json.loads(e["message"])["message"] for e in chromium.get_log("performance")]
    sent = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert sent[0].startswith("file://")
    assert all(url.startswith("data:") for url in sent[1:])


def test_names_from_files_stay_text(chromium, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    profile = write_profile(tmp_path / "prof", blocks=evil, name=evil, notes=(evil,))
    write_analysis(tmp_path / "prof", profile)
    make_plan(profile).save(tmp_path / "plan.yaml")
    write_report(tmp_path / "prof", tmp_path / "evil.html", tmp_path / "plan.yaml")
    tab = Tab(chromium, tmp_path / "evil.html")
    tab.all(".cell")[2].click()
    assert tab.text("#head-title") == f"{evil}.0.attn1#0 · head 2"
    assert tab.text("#tip").startswith(f"{evil}.0.attn1#0, head 2")
    assert tab.all("img") == []
    assert chromium.get_log("browser") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_overflows_and_every_section_is_drawn(theme, width, chromium, pages):
    tab = Tab(chromium, pages / "report.html", theme=theme, width=width)
    tab.wait("return document.querySelector('#frame-number-value').textContent !== ''")
    assert tab.run("return document.documentElement.scrollWidth") == width
    ground = 245 if theme == "light" else 17
    for number, section in enumerate(tab.all("main > header, main > section")):
        tab.run("arguments[0].scrollIntoView()", section)
        time.sleep(0.05)
        pixels = tab.pixels()[..., :3].astype(float)
        assert pixels.std() > 5, number  # neither blank nor of one colour
        assert abs(np.median(pixels[100:, :4]) - ground) < 10, number  # left of every card


def test_a_click_shows_the_head(tab):
    tab.all(".cell")[5].click()
    assert tab.text("#head-title") == "blocks.1.attn1#0 · head 1"
    label = tab.all(".cell")[5].get_attribute("aria-label")
    assert "window: frames 2, rows 3, cols 3" in label
    assert "predicted error" in label
    assert "class stripe (stripe), margin 0.3 dB" in label
    assert tab.text("#head-numbers").startswith("Choicewindow: frames 2, rows 3, cols 3Kept blocks")
    kept = tab.canvas("#kept")
    assert kept.shape == (16, 16, 4)
    assert len(np.unique(kept.reshape(-1, 4), axis=0)) == 2  # kept or not


def test_arrow_keys_move_through_the_matrix(tab):
    tab.run("document.querySelector('.cell').focus()")
    tab.press("ARROW_RIGHT", "ARROW_DOWN")
    assert tab.focused().startswith("blocks.1.attn1#0, head 1,")
    assert tab.text("#head-title") == "blocks.1.attn1#0 · head 1"
    tab.press("END")
    assert tab.focused().startswith("blocks.1.attn1#0, head 3,")
    tab.press("ARROW_RIGHT", "ARROW_DOWN", "ARROW_DOWN")  # stops at the edges
    assert tab.focused().startswith("blocks.2.attn1#0, head 3,")
    tab.press("HOME", "PAGE_UP")
    assert tab.focused().startswith("blocks.0.attn1#0, head 0,")
    assert len(tab.all(".cell[tabindex='0']")) == 1
    assert tab.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert tab.one("#tip").is_displayed()
    tab.press("ESCAPE")
    assert not tab.one("#tip").is_displayed()


def test_tab_reaches_every_control(tab):
    tab.run("document.body.focus()")
    reached = []
    for _ in range(60):
        tab.press("TAB")
        reached.append(tab.run("return document.activeElement.id || document.activeElement.value"))
        if "frame-border" in reached:
            break
    for name in ("theme", "0", "1", "choice", "verdict", "dim", "call", "frame-number"):
        assert name in reached, name


def test_phases_and_views_change_the_cells(tab):
    cell = tab.all(".cell")[5]
    assert "f-window" in cell.get_attribute("class")
    tab.all("#phases button")[0].click()
    assert "f-dense" in cell.get_attribute("class")
    assert tab.all("#phases button")[0].get_attribute("aria-pressed") == "true"
    tab.all("#phases button")[1].click()
    tab.one("#views button[value=density]").click()
    assert "heat" in cell.get_attribute("class")
    assert cell.text.isdigit()
    tab.one("#views button[value=verdict]").click()
    assert cell.text == "R"
    assert "refresh online (3)" in tab.text("#matrix-legend")
    tab.one("#views button[value=choice]").click()
    assert "chosen from the data (4)" in tab.text("#matrix-legend")


def test_maps_follow_the_call_and_can_be_dimmed(tab):
    tab.all(".cell")[1].click()
    before = tab.canvas("#map")
    slider = tab.one("#call")
    slider.click()
    tab.press("END")
    assert tab.text("#call-name") == "call 10"
    after = tab.canvas("#map")
    assert (before != after).any()
    tab.one("#dim").click()
    assert (tab.canvas("#map") != after).any()
    assert (
        tab.one("#recall").get_attribute("aria-label").startswith("Recall curve: 50% of the mass")
    )


def test_selected_from_data_shows_the_blocks_of_most_attention(tab):
    tab.all(".cell")[8].click()
    assert "here the fewest blocks with 90% of the mass" in tab.text("#kept-caption")
    assert "25% of the blocks, chosen from the data" in tab.text("#head-numbers")


def test_a_skipped_call_shows_its_sources(tab):
    call = tab.all(".call")[7]
    tab.run("arguments[0].focus()", call)
    sources = tab.all(".call.source")
    assert [source.text for source in sources] == ["-0.60", "1.60"]
    tab.run("arguments[0].blur()", call)
    assert tab.all(".call.source") == []


def test_marks_of_charts_are_told(tab):
    marks = tab.all("#search .mark")
    assert len(marks) == 7 + 3 + 3
    tab.run("arguments[0].focus()", marks[0])
    tab.press("ARROW_RIGHT")
    assert tab.focused().startswith("frontier: 1.50× at 42.5 dB predicted")
    assert len(tab.all("#search .chosen")) == 4  # tune and audit of the plan, in both charts


def test_the_theme_follows_the_system_and_the_button(chromium, pages):
    tab = Tab(chromium, pages / "report.html", theme="dark")
    shade = "return getComputedStyle(document.body).backgroundColor"
    dark, map_dark = tab.run(shade), tab.canvas("#map")
    assert tab.one("#theme").get_attribute("aria-label") == "Switch to the light theme"
    tab.one("#theme").click()
    light = tab.run(shade)
    assert dark != light
    assert (tab.canvas("#map") != map_dark).any()
    tab.driver.refresh()
    assert tab.run(shade) == light  # kept
    tab.run("localStorage.clear()")


def test_frames_are_compared(tab):
    tab.wait("return document.querySelector('#frame-number-value').textContent !== ''")
    dense, optimized = tab.canvas("#frame-dense"), tab.canvas("#frame-optimized")
    assert dense.shape == (48, 64, 4)
    gain = int(tab.one("#frame-gain").get_attribute("value"))
    difference = np.abs(dense[..., :3] - optimized[..., :3])
    np.testing.assert_array_equal(
        tab.canvas("#frame-difference")[..., :3], np.minimum(255, gain * difference)
    )
    split = tab.canvas("#frame-split")
    np.testing.assert_array_equal(split[:, :32], dense[:, :32])
    np.testing.assert_array_equal(split[:, 33:], optimized[:, 33:])
    tab.run("document.querySelector('#frame-number').focus()")
    tab.press("HOME")
    assert tab.text("#frame-number-value") == "1 of 8"
    assert (tab.canvas("#frame-dense") != dense).any()


def test_on_paper_controls_are_gone(tab):
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not tab.one(".bar").is_displayed()
    assert not tab.one("#views").is_displayed()
    assert tab.one("#matrix").is_displayed()
    assert tab.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
