// A JSON reader, as much as manifests and safetensors headers need: no dependency to install.
#pragma once

#include <cctype>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct Json {
  enum Kind { Null, Bool, Number, String, Array, Object } kind = Null;
  bool flag = false;
  double number = 0;
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  bool null() const { return kind == Null; }
  int64_t integer() const { return static_cast<int64_t>(number); }
  bool has(const std::string& key) const {
    for (auto& member : members)
      if (member.first == key) return true;
    return false;
  }
  const Json& operator[](const std::string& key) const {
    for (auto& member : members)
      if (member.first == key) return member.second;
    throw std::runtime_error("missing key: " + key);
  }
  const Json& operator[](size_t index) const { return items.at(index); }
  std::vector<int64_t> integers() const {
    std::vector<int64_t> out;
    for (auto& item : items) out.push_back(item.integer());
    return out;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json read() {
    Json value = any();
    skip();
    if (at_ != text_.size()) fail("trailing characters");
    return value;
  }

 private:
  const std::string& text_;
  size_t at_ = 0;
  int depth_ = 0;

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("JSON: " + what + " at byte " + std::to_string(at_));
  }
  void skip() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }
  char peek() {
    skip();
    if (at_ >= text_.size()) fail("unexpected end");
    return text_[at_];
  }
  void expect(char wanted) {
    if (peek() != wanted) fail(std::string("expected ") + wanted);
    ++at_;
  }
  bool word(const char* name) {
    std::string wanted(name);
    if (text_.compare(at_, wanted.size(), wanted) != 0) return false;
    at_ += wanted.size();
    return true;
  }
  Json any() {
    if (++depth_ > 64) fail("too deep");
    Json value;
    char next = peek();
    if (next == '{') {
      value.kind = Json::Object;
      ++at_;
      for (bool first = true; peek() != '}'; first = false) {
        if (!first) expect(',');
        std::string key = (peek(), string());
        expect(':');
        value.members.emplace_back(key, any());
      }
      ++at_;
    } else if (next == '[') {
      value.kind = Json::Array;
      ++at_;
      for (bool first = true; peek() != ']'; first = false) {
        if (!first) expect(',');
        value.items.push_back(any());
      }
      ++at_;
    } else if (next == '"') {
      value.kind = Json::String;
      value.text = string();
    } else if (word("null")) {
    } else if (word("true")) {
      value.kind = Json::Bool, value.flag = true;
    } else if (word("false")) {
      value.kind = Json::Bool;
    } else {
      size_t used = 0;
      try {
        value.number = std::stod(text_.substr(at_, 40), &used);
      } catch (const std::exception&) {
        fail("no value");
      }
      value.kind = Json::Number;
      at_ += used;
    }
    --depth_;
    return value;
  }
  std::string string() {
    expect('"');
    std::string out;
    while (true) {
      if (at_ >= text_.size()) fail("unfinished string");
      char c = text_[at_++];
      if (c == '"') return out;
      if (c != '\\') {
        out += c;
        continue;
      }
      char escaped = text_.at(at_++);
      switch (escaped) {
        case 'n': out += '\n'; break;
        case 't': out += '\t'; break;
        case 'r': out += '\r'; break;
        case 'b': out += '\b'; break;
        case 'f': out += '\f'; break;
        case 'u': {  // names are ASCII; anything else becomes a question mark
          int code = std::stoi(text_.substr(at_, 4), nullptr, 16);
          at_ += 4;
          out += code < 128 ? static_cast<char>(code) : '?';
          break;
        }
        default: out += escaped;
      }
    }
  }
};
