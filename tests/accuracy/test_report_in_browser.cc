// The report as a browser draws it: headless Chromium lays the page out and a script that stands in
// the test's copy alone measures what a reader would see.
#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "report/accuracy_report.h"
#include "report_example.h"

namespace sluice::testing {
namespace {

using Json = nlohmann::ordered_json;

/// Leaves one JSON object in the page: what sticks out, what is missing, which labels collide.
constexpr const char* kMeasure = R"js(<script>
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
const found = {width: document.documentElement.clientWidth,
               overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
               sections: [...document.querySelectorAll('section h2')].map(h => h.textContent),
               plots: 0, marks: 0, outside: [], collisions: [], cut: []};
for (const part of document.querySelectorAll('details')) part.open = true;
for (const box of document.querySelectorAll('.scroll')) {
  if (box.scrollWidth > box.clientWidth) found.cut.push(box.textContent.slice(0, 40));
}
for (const svg of document.querySelectorAll('svg')) {
  const frame = svg.getBoundingClientRect();
  if (frame.width > 100 && frame.height > 50) found.plots += 1;
  for (const mark of svg.querySelectorAll('rect:not(.danger),polyline')) {
    if (mark.getBoundingClientRect().width > 0) found.marks += 1;
  }
  const texts = [...svg.querySelectorAll('text')];
  const boxes = texts.map(t => t.getBoundingClientRect());
  boxes.forEach((box, i) => {
    if (box.left < frame.left || box.right > frame.right + 0.5 || box.bottom > frame.bottom) {
      found.outside.push(texts[i].textContent);
    }
    for (let j = 0; j < i; ++j) {
      if (!apart(box, boxes[j])) found.collisions.push(texts[j].textContent + ' on ' + texts[i].textContent);
    }
  });
}
document.body.innerHTML = '<pre id="found"></pre>';
document.getElementById('found').textContent = 'FOUND' + JSON.stringify(found) + 'DNUOF';
</script>)js";

class ReportInBrowser : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::system("command -v chromium > /dev/null 2>&1") != 0) {
      GTEST_SKIP() << "chromium is not installed; scripts/setup.sh installs it";
    }
    std::filesystem::create_directories(dir_);
  }
  ~ReportInBrowser() override {
    std::error_code ignored;
    std::filesystem::remove_all(dir_, ignored);
  }

  /// Chromium with `arguments` on `html`; its standard output.
  std::string run(const std::string& html, const std::string& arguments) {
    std::ofstream(dir_ / "report.html") << html;
    const std::string command =
        "timeout 60 chromium --headless --no-sandbox --disable-gpu --hide-scrollbars "
        "--user-data-dir=" +
        (dir_ / "profile").string() + " " + arguments + " file://" +
        (dir_ / "report.html").string() + " > " + (dir_ / "out").string() + " 2> /dev/null";
    EXPECT_EQ(std::system(command.c_str()), 0) << command;
    std::ostringstream out;
    out << std::ifstream(dir_ / "out").rdbuf();
    return out.str();
  }

  Json measure(std::string html, int width) {
    html.insert(html.rfind("</body>"), kMeasure);
    const std::string page =
        run(html, "--dump-dom --window-size=" + std::to_string(width) + ",2000");
    const std::size_t begin = page.find("FOUND{"), end = page.find("DNUOF");
    if (begin == std::string::npos || end == std::string::npos) return {};
    return Json::parse(page.substr(begin + 5, end - begin - 5));
  }

  std::filesystem::path dir_ =
      std::filesystem::temp_directory_path() / ("sluice-report-" + std::to_string(::getpid()));
};

TEST_F(ReportInBrowser, EverythingIsDrawnAndNothingCollides) {
  const std::string html = report::accuracy_report(report_example());
  const Json found = measure(html, 1200);
  ASSERT_TRUE(found.is_object());
  EXPECT_EQ(found["width"], 1200);
  EXPECT_LE(found["overflow"], 0);
  // Two of bars; for each of two suites channels, tokens and headroom.
  EXPECT_EQ(found["plots"], 2 + 2 * 3);
  // Six bars of each suite in both, six lines of each suite in both; headroom has at least one bar.
  EXPECT_GE(found["marks"], 2 * 12 + 2 * 12 + 2);
  for (const char* section : {"Error by recipe and suite", "Every number of the output",
                              "Each rounding alone, and all together", "Error by output channel",
                              "Worst tokens", "Static scales against what the tokens contain"}) {
    EXPECT_NE(std::ranges::find(found["sections"], Json(section)), found["sections"].end())
        << section;
  }
  EXPECT_EQ(found["outside"], Json::array());
  EXPECT_EQ(found["collisions"], Json::array());
  EXPECT_EQ(found["cut"], Json::array());
}

TEST_F(ReportInBrowser, AllLayersAreDrawn) {
  const Json found = measure(report::accuracy_report(layers_example()), 1200);
  ASSERT_TRUE(found.is_object());
  EXPECT_LE(found["overflow"], 0);
  EXPECT_EQ(found["plots"], 2 + 2 + 2 * 3);  // One more for each suite.
  EXPECT_EQ(found["sections"][0], "Layer by layer");
  EXPECT_EQ(found["outside"], Json::array());
  EXPECT_EQ(found["collisions"], Json::array());
  EXPECT_EQ(found["cut"], Json::array());
}

TEST_F(ReportInBrowser, FitsANarrowScreen) {
  const Json found = measure(report::accuracy_report(report_example()), 600);
  ASSERT_TRUE(found.is_object());
  EXPECT_LE(found["overflow"], 0);
}

/// The measuring itself: a label moved onto another, and one out of its plot, are seen.
TEST_F(ReportInBrowser, SeesPlantedFlaws) {
  std::string html = report::accuracy_report(report_example());
  const std::string svg =
      "<svg viewBox='0 0 900 100'><text x='20' y='50'>here</text><text x='22' y='52'>there</text>"
      "<text x='880' y='90'>beyond the edge</text></svg><div style='width:3000px'>wide</div>"
      "<div class='scroll'><div style='width:3000px'>a wide table</div></div>";
  html.insert(html.rfind("</main>"), svg);
  const Json found = measure(html, 1200);
  ASSERT_TRUE(found.is_object());
  EXPECT_EQ(found["collisions"], Json({"here on there"}));
  EXPECT_EQ(found["outside"], Json({"beyond the edge"}));
  EXPECT_EQ(found["cut"], Json({"a wide table"}));
  EXPECT_GT(found["overflow"], 1000);
}

TEST_F(ReportInBrowser, IsNotABlankPicture) {
  const auto bytes_of = [&](const std::string& html) {
    const auto png = dir_ / "report.png";
    std::filesystem::remove(png);
    (void)run(html, "--window-size=1200,2000 --screenshot=" + png.string());
    return std::filesystem::exists(png) ? std::filesystem::file_size(png) : 0;
  };
  EXPECT_GT(bytes_of(report::accuracy_report(report_example())), 5 * bytes_of("<p>Sluice</p>"));
}

}  // namespace
}  // namespace sluice::testing
